"""P2: any world size, any number of workers, any sequence of stops ends in the same bits."""

import hashlib
import random

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.processes


def everything(outcome):
    """Parameters, buffers and optimizer state as bytes; losses as hex floats, which tell the samples apart too."""
    files = [hashlib.sha256((outcome.newest / name).read_bytes()).hexdigest() for name in FILES]
    return outcome.digest, tuple(files), tuple(outcome.losses)


FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("recipe", "shards", "world_sizes"),
    [
        ("digits_cnn.py", 8, (1, 2, 3, 5)),
        ("char_lm.py", 6, (1, 4)),
        pytest.param("digits_cnn.py", 8, (4, 8), marks=pytest.mark.slow),
        pytest.param("char_lm.py", 8, (1, 2, 3, 4, 5, 8), marks=pytest.mark.slow),
        pytest.param("seed_linear.py", 8, (1, 2, 3, 4, 5, 8), marks=pytest.mark.slow),
        pytest.param("digits_cnn.py", 2, (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("digits_cnn.py", 3, (1, 2, 3, 4), marks=pytest.mark.slow),
        pytest.param("digits_cnn.py", 6, (1, 2, 3, 4, 5, 6), marks=pytest.mark.slow),
    ],
)
def test_every_world_size_ends_in_the_same_bits(start, recipe, shards, world_sizes):
    flags = ("--shards", str(shards), "--max-steps", "24", "--log-every", "5")
    results = {W: everything(start("samestep", W, recipe, *flags, run_dir=f"W{W}")) for W in world_sizes}
    assert len(set(results.values())) == 1, results


@pytest.mark.timeout(120)
def test_worker_processes_do_not_change_the_bits(start):
    flags = ("--shards", "2", "--max-steps", "24")
    results = [
        everything(start("samestep", 2, "digits_cnn.py", *flags, "--num-workers", str(n), run_dir=f"n{n}"))
        for n in (0, 1, 2)
    ]
    assert len(set(results)) == 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 20))])
def test_stops_at_random_steps_and_other_world_sizes_end_in_the_same_bits(start, seed):
    draw = random.Random(seed)
    total, shards, recipe = 30, draw.choice([2, 3, 4, 6]), draw.choice(["digits_cnn.py", "char_lm.py"])
    flags = ("--shards", str(shards), "--log-every", "7", "--checkpoint-every", "4")
    whole = start("samestep", 1, recipe, *flags, "--max-steps", str(total), run_dir="whole")
    stopped = whole
    for stop in [*sorted(draw.sample(range(1, total), 3)), total]:
        workers = str(draw.choice([0, 1]))
        stopped = start(
            "samestep", draw.randint(1, 4), recipe, *flags, "--max-steps", str(stop), "--num-workers", workers,
            run_dir="stopped",
        )  # fmt: skip
        assert [step for step, _ in stopped.losses] == list(range(1, stop + 1))
    assert everything(stopped) == everything(whole)


@pytest.mark.timeout(120)
def test_exported_weights_load_strictly_and_have_the_digest(start):
    outcome = start("python", 1, "char_lm.py", "--max-steps", "2")
    weights = load_file(outcome.run_dir / "weights.safetensors")
    assert set(weights) >= {"characters.weight", "head.weight"}
    assert weights["characters.weight"].equal(weights["head.weight"])
