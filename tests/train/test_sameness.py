"""One digest, one optimizer state and one list of losses, whatever number of ranks a run has."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.timeout(120)


def differing(trained: Any, *flags: object, shards: int, worlds: tuple[int, ...], base: int = 1) -> list[int]:
    """World sizes whose bits are not those of one rank."""
    first = trained("everything", "--shards", shards, *flags, ranks=base, cwd=f"base-{base}")
    expected = first.bits
    assert len(expected["losses"]) >= 5
    assert len(set(expected["losses"])) == len(expected["losses"])
    found = {
        world: trained("everything", "--shards", shards, *flags, ranks=world, cwd=f"world-{world}").bits
        for world in worlds
    }
    return [world for world, bits in found.items() if bits != expected]


@pytest.mark.parametrize(("shards", "worlds"), [(4, (2, 3, 4)), pytest.param(3, (2, 3), marks=pytest.mark.slow)])
def test_everything_that_is_hard_has_the_same_bits_on_any_number_of_ranks(
    trained: Any, shards: int, worlds: tuple[int, ...]
) -> None:
    """BatchNorm, Dropout, random datasets, tied, frozen, rarely used and never used parameters, an integer buffer."""
    assert differing(trained, shards=shards, worlds=worlds) == []


@pytest.mark.parametrize("unused", ["--unused", "--no-unused"])
@pytest.mark.parametrize(
    ("shards", "ranks"),
    [(3, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 2), (4, 3), (4, 4)))],
)
def test_ranks_that_share_no_memory_have_the_same_bits(trained: Any, shards: int, ranks: int, unused: str) -> None:
    """Gradients then go through gloo, and with them the weights and the statistics of BatchNorm."""
    flags = ("--shards", shards, unused)
    together = trained("everything", *flags, ranks=ranks, cwd="together")
    apart = trained("apart", *flags, ranks=ranks, cwd="apart", env={"RECIPE": "everything"})
    assert apart.bits == together.bits
    ways = [json.loads((run.run_dir / "config.json").read_text())["exchange"] for run in (together, apart)]
    assert ways == ["shared memory", "the process group"]


def test_a_loss_finds_the_models_attributes_on_any_number_of_ranks(trained: Any) -> None:
    one, two = (trained("attributes", "--shards", 2, ranks=ranks, cwd=f"on-{ranks}") for ranks in (1, 2))
    assert one.bits == two.bits


def test_parameters_that_share_memory_by_transposing_share_it_on_any_number_of_ranks(trained: Any) -> None:
    runs = [trained("transposed", "--shards", 2, "--device", "cpu", ranks=ranks, cwd=f"on-{ranks}") for ranks in (1, 2)]
    assert runs[0].bits == runs[1].bits


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_autocast_keeps_the_promise(trained: Any, precision: str) -> None:
    assert differing(trained, "--precision", precision, shards=4, worlds=(3,)) == []


def test_autocast_is_not_ignored(trained: Any) -> None:
    flags = ("--shards", 2, "--max-steps", 2)
    runs = [trained("everything", *flags, "--precision", kind, cwd=kind) for kind in ("no", "bf16", "fp16")]
    assert len({ended.digest for ended in runs}) == 3


def test_gradient_clipping_keeps_the_promise_and_clips(trained: Any) -> None:
    flags = ("--shards", 4, "--clip-grad-norm", 0.05)
    tight = [trained("everything", *flags, ranks=ranks, cwd=f"tight on {ranks}").bits for ranks in (1, 3)]
    assert tight[0] == tight[1] != trained("everything", "--shards", 4, cwd="loose").bits


def test_ranks_without_a_sample_and_surplus_ranks_keep_the_promise(trained: Any) -> None:
    """Last batch of 2 samples for 4 shards; and more ranks than shards."""
    flags = ("--no-normalise", "--samples", 37, "--global-batch-size", 7)
    assert differing(trained, *flags, shards=4, worlds=(2, 5)) == []


def test_a_batch_of_one_sample_keeps_buffers_and_bits(trained: Any) -> None:
    flags = ("--no-normalise", "--samples", 25, "--global-batch-size", 6, "--epochs", 1)
    assert differing(trained, *flags, shards=3, worlds=(2, 3)) == []


def test_all_parameters_used_goes_the_fast_way_with_the_same_bits(trained: Any) -> None:
    """Then DDP does not look for unused parameters, and a rank's last shard runs through it."""
    assert differing(trained, "--no-unused", shards=4, worlds=(2, 3, 4)) == []


def test_seven_shards_on_three_and_five_ranks(trained: Any) -> None:
    """A rank owns several roots, of different sizes."""
    flags = ("--global-batch-size", 21, "--samples", 120, "--epochs", 1)
    assert differing(trained, *flags, shards=7, worlds=(3, 5)) == []


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_never_change_the_bits(trained: Any, workers: int) -> None:
    expected = trained("everything", "--shards", 4, cwd="base").bits
    assert trained("everything", "--shards", 4, "--num-workers", workers, ranks=2).bits == expected


def test_a_run_stopped_in_an_epoch_goes_on_with_other_ranks_in_the_same_bits(trained: Any) -> None:
    expected = trained("everything", "--shards", 4, cwd="base").bits
    for steps, ranks in ((5, 2), (9, 4), (11, 1)):
        trained("everything", "--shards", 4, "--max-steps", steps, ranks=ranks)
    ended = trained("everything", "--shards", 4, ranks=3)
    assert ended.bits == expected
    assert [event["step"] for event in ended.events("step")] == list(range(1, 19))
    assert [event["steps"] for event in ended.events("run_finished")] == [5, 9, 11, 18]


def test_a_finished_run_started_again_says_its_digest_and_changes_nothing(trained: Any) -> None:
    first = trained("everything", "--shards", 4, "--epochs", 1)
    expected, events = first.bits, (first.run_dir / "events.jsonl").read_text()
    for ranks in (2, 1):
        again = trained("everything", "--shards", 4, "--epochs", 1, ranks=ranks)
        assert expected["digest"] in again.stdout
        assert again.bits == expected
        assert (again.run_dir / "events.jsonl").read_text() == events


def test_other_seeds_and_shards_have_other_bits(trained: Any) -> None:
    digests = {
        trained("everything", "--max-steps", 2, "--shards", shards, "--seed", seed, cwd=f"{shards}-{seed}").digest
        for shards, seed in ((4, 0), (3, 0), (4, 1))
    }
    assert len(digests) == 3


def test_a_parameter_no_shard_uses_keeps_its_first_bits_and_has_no_optimizer_state(trained: Any) -> None:
    """Weight decay would move it if its gradient were zero instead of None."""
    one = trained("everything", "--shards", 4, "--max-steps", 1, ranks=2, cwd="one").weights
    all_steps = trained("everything", "--shards", 4, ranks=2, cwd="all").weights
    for name in ("never.weight", "never.bias", "frozen", "constant"):
        assert torch.equal(one[name], all_steps[name]), name
    for name in ("first.weight", "early.weight", "some.weight", "last.bias", "norm.running_mean"):
        assert not torch.equal(one[name], all_steps[name]), name


def test_a_tied_weight_is_saved_once_and_an_integer_buffer_counts_steps(trained: Any) -> None:
    weights = trained("everything", "--shards", 4, ranks=3).weights
    assert "first.weight" in weights
    assert "last.weight" not in weights
    assert int(weights["seen"]) == int(weights["norm.num_batches_tracked"]) == 18


def test_fast_reduction_keeps_order_and_weighting_but_is_not_promised_the_bits(trained: Any) -> None:
    """Same samples in every step, losses and weights close; bits are not compared with other world sizes."""
    exact = trained("everything", "--shards", 4, cwd="exact")
    for ranks in (2, 3):
        fast = trained("everything", "--shards", 4, "--reduction", "fast", ranks=ranks, cwd=f"fast-{ranks}")
        pairs = list(zip(exact.events("step"), fast.events("step"), strict=True))
        assert all(left["samples"] == right["samples"] for left, right in pairs)
        assert all(abs(left["loss"] - right["loss"]) < 1e-4 * left["loss"] for left, right in pairs)
        for name, weight in exact.weights.items():
            other = fast.weights[name].double()
            assert (other - weight.double()).norm() <= 1e-3 * (weight.double().norm() + 1e-9), name


@pytest.mark.parametrize("recipe", ["buckets", pytest.param("apart", marks=pytest.mark.slow)])
def test_no_bit_depends_on_the_size_of_buckets(trained: Any, recipe: str) -> None:
    """Roots are added element by element in one order, however many elements are sent at once."""
    flags = ("--shards", 4, "--micro-batches", 2)
    reference = trained("buckets", *flags, cwd="one", env={"BUCKET_MB": "25"})
    for ranks in (2, 3):
        counts = []
        for size in ("0.001", "0.03", "25"):
            env = {"BUCKET_MB": size, "RECIPE": "buckets"}
            ended = trained(recipe, *flags, ranks=ranks, cwd=f"{ranks}-{size}", env=env)
            assert ended.bits == reference.bits, (ranks, size)
            counts.append(int(ended.stdout.split("buckets: ")[1]))
        assert counts[0] > counts[1] > counts[2] > 0


def test_buckets_of_several_sizes_are_tried_and_one_is_kept_in_the_same_bits(trained: Any) -> None:
    flags = ("--shards", 4, "--log-every", 1, "--epochs", 2)
    reference = trained("buckets", *flags, cwd="one", env={"BUCKET_MB": "25"})
    assert "travel" not in reference.stdout
    for recipe, ranks in (("buckets", 3), ("apart", 2)):
        counts = []
        for sizes in ("25", "25 0.001 0.03", "0.001"):
            env = {"BUCKET_MB": sizes, "RECIPE": "buckets"}
            ended = trained(recipe, *flags, ranks=ranks, cwd=f"{ranks}-{sizes}", env=env)
            assert ended.bits == reference.bits, (ranks, sizes)
            counts.append(int(ended.stdout.split("buckets: ")[1]))
            tried = ended.stdout.count("gradients travel in buckets of ")
            assert tried == (" " in sizes)
        assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("case", ["loss", "forwards", pytest.param("outputs", marks=pytest.mark.slow)])
def test_what_one_forward_does_not_show_to_be_used_is_summed_on_any_number_of_ranks(trained: Any, case: str) -> None:
    """A parameter of the loss alone, layers of one of two forwards, outputs that few losses use."""
    runs = [trained("partly_used", "--shards", 4, "--case", case, ranks=n, cwd=f"on-{n}") for n in (1, 2, 3)]
    assert all(run.bits == runs[0].bits for run in runs)


@pytest.mark.compiler
def test_a_loss_that_transforms_the_model_has_the_same_bits_on_any_number_of_ranks(trained: Any) -> None:
    flags = ("--shards", 3, "--global-batch-size", 6, "--epochs", 2)
    one, two = (trained("transformed", *flags, ranks=ranks, cwd=f"of {ranks}") for ranks in (1, 2))
    assert one.bits == two.bits


@pytest.mark.parametrize("way", ["names", "modules", "attribute", "sets", "outside", "layers"])
def test_a_loss_gets_the_model_itself_on_any_number_of_ranks(trained, way):
    """Of two ranks one has two shards, and so runs the model both without DDP and through it; the other has one."""
    alone, two = (trained("looking", "--way", way, "--shards", 3, ranks=n, cwd=f"{n}") for n in (1, 2))
    assert two.bits == alone.bits
    assert alone.bits != trained("looking", "--shards", 3, cwd="plain").bits or way in ("outside", "layers")
