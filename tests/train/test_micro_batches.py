"""Shards in parts: the same samples and weights, the same bits on any number of ranks, twice as many after a CUDA OOM.

What a full GPU does is raised by the recipe: torch's own exception, for batches of more than `--room` samples.
"""

from __future__ import annotations

import json
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samestep.launcher.contract import UsageError
from samestep.train.data.cut import cut, obstacle
from samestep.train.parallel.shards import MicroBatch, StepPlan

pytestmark = pytest.mark.timeout(120)
CASES = {
    "dropout": ("--dropout", 0.3),
    "tokens": ("--weigh", "tokens"),
    "batch norm": ("--norm", "2d", "--global-batch-size", 7),
    "clipped": ("--clip-grad-norm", 0.1, "--global-batch-size", 13),
}


@pytest.mark.parametrize(
    "case", ["batch norm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dropout", "tokens", "clipped"))]
)
def test_parts_of_shards_have_the_same_bits_on_any_number_of_ranks(trained: Any, case: str) -> None:
    flags = ("--shards", 3, "--micro-batches", 2, *CASES[case])
    first = trained("hungry", *flags, cwd="W1")
    for ranks in (2, 3, 4):
        assert trained("hungry", *flags, ranks=ranks, cwd=f"W{ranks}").bits == first.bits, ranks
    assert first.digest != trained("hungry", "--shards", 3, *CASES[case], cwd="whole").digest


def test_one_shard_in_parts_has_the_same_bits_where_other_ranks_idle(trained: Any) -> None:
    for case in ("dropout", "batch norm"):
        flags = ("--shards", 1, "--micro-batches", 3, *CASES[case])
        alone, beside = (trained("hungry", *flags, ranks=n, cwd=f"{case}-{n}") for n in (1, 2))
        assert alone.bits == beside.bits


def test_more_parts_than_samples_are_one_sample_each(trained: Any) -> None:
    results = [trained("hungry", "--shards", 2, "--micro-batches", n, ranks=2, cwd=f"{n}").bits for n in (6, 99)]
    assert results[0] == results[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_lack_of_memory_the_next_start_goes_on_in_smaller_parts(start: Any, trained: Any, ranks: int) -> None:
    """Nothing was saved: what follows is the run that had two parts from the begin."""
    flags = ("--shards", 2, "--dropout", 0.2)
    failed = start("hungry", "--run-dir", "run", *flags, "--room", 3, ranks=ranks)
    assert failed.codes.count(1) >= 1
    assert "torch.OutOfMemoryError" in failed.stderrs
    assert "the next start cuts each shard's batch into 2 micro-batches" in failed.stderrs
    again = trained("hungry", *flags, "--room", 3, ranks=3 - ranks)
    assert again.bits == trained("hungry", *flags, "--micro-batches", 2, cwd="fixed").bits
    (warning,) = [event["text"] for event in again.events("warning") if "parts" in event["text"]]
    assert "ran out of memory in step 1" in warning
    assert "changed from 1 to 2" in warning
    assert json.loads((again.run_dir / "config.json").read_text())["micro_batches"] == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_before_the_lack_of_memory_keep_their_bits(start: Any, trained: Any, ranks: int) -> None:
    flags = ("--shards", 2, "--checkpoint-every", 2, "--keep-checkpoints", 9)
    failed = start("hungry", "--run-dir", "run", *flags, "--room", 3, "--full-after", 6, ranks=ranks)
    assert any(failed.codes)
    saved = len(list(failed.run_dir.glob("checkpoints/step-????????"))) * 2  # the last save may be under way
    assert saved in (4, 6)
    again = trained("hungry", *flags, "--room", 3, "--full-after", 6, ranks=ranks)
    trained("hungry", *flags, "--max-steps", saved, cwd="fixed")
    assert again.bits == trained("hungry", *flags, "--micro-batches", 2, cwd="fixed").bits
    before, after = (
        json.loads((again.run_dir / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
        for step in (saved, saved + 2)
    )
    assert (before["micro_batches"], after["micro_batches"]) == (1, 2)


def test_a_later_start_keeps_the_number_and_says_so(start: Any, trained: Any) -> None:
    start("hungry", "--run-dir", "run", "--room", 6)
    trained("hungry", "--room", 6, "--max-steps", 2)
    ended = trained("hungry", "--room", 6, "--max-steps", 4)
    assert ["ran out of memory" in event["text"] for event in ended.events("warning")] == [True, True]
    trained("hungry", "--room", 12, "--micro-batches", 1, "--max-steps", 5)
    changed = "micro-batches changed from 2 to 1 since the last start"
    assert any(event["text"].startswith(changed) for event in ended.events("warning"))


def test_batch_norm_is_named_where_its_batches_get_smaller(start: Any, trained: Any) -> None:
    start("hungry", "--run-dir", "run", "--room", 6, "--norm", "2d")
    ended = trained("hungry", "--room", 6, "--norm", "2d", "--max-steps", 1)
    assert "BatchNorm's statistics are those of a part" in ended.events("warning")[-1]["text"]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (("--room", 0, "--micro-batches", 3), "--micro-batches auto, or more than 3, needs less memory"),
        (
            ("--packed", "--room", 4),
            "a batch can't be cut into micro-batches (a batch of 12 samples has a tensor of shape (36, 4))",
        ),
        (("--room", 0, "--shards", 12), "as many as its samples allow"),
        # the last batch leaves 4 samples: two parts of two are the most for a BatchNorm1d
        (("--room", 0, "--norm", "1d", "--samples", 28, "--shards", 2), "as many as its samples allow"),
    ],
    ids=["fixed", "packed", "one sample", "BatchNorm1d"],
)
def test_what_smaller_parts_can_not_help_says_why(start: Any, flags: tuple[object, ...], hint: str) -> None:
    failed = start("hungry", "--run-dir", "run", *flags)
    assert failed.codes == [1]
    record = json.loads((failed.run_dir / "errors" / "rank-0.json").read_text())
    assert record["kind"] == "OutOfMemoryError"
    assert hint in record["hint"]
    assert not record["remedied"]
    assert not (failed.run_dir / "micro_batches.json").exists()


def test_a_batch_that_can_not_be_cut_is_a_sentence(start: Any) -> None:
    failed = start("hungry", "--run-dir", "run", "--packed", "--micro-batches", 2)
    assert failed.codes == [2]
    assert "every tensor of a batch is expected to have one row a sample" in failed.stderr
    assert "Traceback" not in failed.stderr


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 70))
def test_parts_are_near_equal_and_make_up_the_shard(samples: int, shards: int, count: int) -> None:
    plan = StepPlan(0, 0, 100, 100 + samples, shards, count)
    for shard in plan.present((0, shards)):
        parts, size = plan.parts(shard), plan.size(shard)
        assert len(parts) == min(count, size)
        assert [i for part in parts for i in range(part.begin, part.end)] == list(range(size))
        assert max(part.samples for part in parts) - min(part.samples for part in parts) <= 1
        assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]


class Pair(NamedTuple):
    x: torch.Tensor
    y: Any


PART = MicroBatch(0, 1, 3, first=False, last=False)
ROWS = torch.arange(8).view(4, 2)


def test_trees_of_tensors_are_cut_and_scalars_stay() -> None:
    words = ["a", "b", "c", "d"]
    assert torch.equal(cut(ROWS, PART, 4), ROWS[1:3])
    named = cut(Pair(ROWS, {"n": np.arange(4), "k": 0.5, "none": None, "t": torch.tensor(3)}), PART, 4)
    assert isinstance(named, Pair)
    assert torch.equal(named.x, ROWS[1:3])
    assert named.y["n"].tolist() == [1, 2]
    assert (named.y["k"], named.y["none"], int(named.y["t"])) == (0.5, None, 3)
    mixed = cut(OrderedDict(a=[ROWS, words], b=tuple(words)), PART, 4)
    assert torch.equal(mixed["a"][0], ROWS[1:3])
    assert (mixed["a"][1], mixed["b"]) == (["b", "c"], ("b", "c"))
    unknown = cut(UserDict(x=ROWS), PART, 4)
    assert isinstance(unknown, UserDict)
    assert torch.equal(unknown["x"], ROWS[1:3])


def test_two_tensors_of_two_samples_are_cut_each() -> None:
    x, y = torch.arange(6).view(2, 3), torch.arange(2)
    part = MicroBatch(0, 0, 1, first=True, last=False)
    for batch in ([x, y], (x, y)):
        first, second = cut(batch, part, 2)
        assert (first.shape, second.shape) == ((1, 3), (1,))


@pytest.mark.parametrize("batch", [torch.zeros(5, 4), {"x": ROWS, "all": torch.zeros(3)}, object(), UserDict(x=ROWS.T)])
def test_other_batches_are_refused_and_left_whole_where_there_is_one_part(batch: object) -> None:
    assert obstacle(batch, 4)
    with pytest.raises(UsageError, match="one row a sample"):
        cut(batch, PART, 4)
    assert cut(batch, MicroBatch(0, 0, 4, first=True, last=True), 4) is batch
