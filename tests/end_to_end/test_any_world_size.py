"""P2: any number of ranks, any number of workers, any sequence of stops ends in the same bits.

Equal are parameters, buffers and optimizer state (bytes of the checkpoint) and the loss of every step (hex floats).
"""

import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
slow = pytest.mark.slow


@pytest.fixture
def bits(rank_server, tmp_path):
    """`bits(folder, recipe, ranks, *flags)`: all that has to be the same, after one more start in `folder`."""

    def run(folder, recipe, ranks, *flags):
        argv = ("--run-dir", "run", *map(str, flags))
        ended = rank_server(tmp_path / folder, RECIPES / f"{recipe}.py", *argv, ranks=ranks, seconds=120)
        assert not any(ended.codes), ended.stderrs
        steps = [event["step"] for event in ended.events("step")]
        assert steps == list(range(1, len(steps) + 1))
        return ended.bits

    return run


@pytest.mark.parametrize(
    ("recipe", "shards", "world_sizes"),
    [
        ("digits_cnn", 5, (2, 4)),
        pytest.param("char_lm", 6, (1, 4), marks=slow),
        ("seed_linear", 3, (1, 2, 3, 4)),
        *(pytest.param(name, 8, (1, 2, 3, 4, 5, 8), marks=slow) for name in ("seed_linear", "digits_cnn", "char_lm")),
        *(pytest.param("digits_cnn", V, range(1, V + 2), marks=slow) for V in (2, 3, 6)),
        *(pytest.param("char_lm", V, range(1, V + 1), marks=slow) for V in (2, 3, 6)),
    ],
)
def test_every_world_size_ends_in_the_same_bits(bits, recipe, shards, world_sizes):
    flags = ("--shards", shards, "--max-steps", 24, "--log-every", 5)
    reference = bits("reference", recipe, 1, *flags)
    for ranks in world_sizes:
        assert bits(f"W{ranks}", recipe, ranks, *flags) == reference, f"{ranks} ranks"


@slow
def test_worker_processes_do_not_change_the_bits(bits):
    flags = ("--shards", 2, "--max-steps", 12)
    results = [bits(f"n{workers}", "digits_cnn", 2, *flags, "--num-workers", workers) for workers in (0, 1, 2)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=slow) for seed in range(20)])
def test_stops_at_random_steps_and_other_world_sizes_end_in_the_same_bits(bits, seed):
    draw = random.Random(seed)
    total, shards, recipe = 30, draw.choice([2, 3, 4, 6]), draw.choice(["digits_cnn", "char_lm"])
    flags = ("--shards", shards, "--log-every", 7, "--checkpoint-every", 4)
    stopped = whole = bits("whole", recipe, 1, *flags, "--max-steps", total)
    for stop in [*sorted(draw.sample(range(1, total), 3)), total]:
        workers = draw.choice([0, 1])
        stopped = bits("stopped", recipe, draw.randint(1, 4), *flags, "--max-steps", stop, "--num-workers", workers)
    assert stopped == whole


def test_exported_weights_load_strictly_tied_ones_under_each_name(bits, tmp_path):
    bits("export", "char_lm", 1, "--max-steps", 2)
    weights = load_file(tmp_path / "export" / "run" / "weights.safetensors")
    assert set(weights) >= {"characters.weight", "head.weight"}
    assert weights["characters.weight"].equal(weights["head.weight"])
