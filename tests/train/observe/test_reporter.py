"""The lines that people read, against arithmetic by hand."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest

from samestep.train.observe.event_log import EventLog
from samestep.train.observe.ledger import EpochSums, phase_line
from samestep.train.observe.reporter import RankZeroReporter, shown

# of two ranks in one step: rank 1 takes 4 s longer, half of it in forward and half in backward, and rank 0 waits
UNEVEN = [[[0.0, 3.0, 3.0, 4.0, 0.0]], [[0.0, 5.0, 5.0, 0.0, 0.0]]]


@pytest.fixture
def reporter(tmp_path: Path) -> RankZeroReporter:
    """An epoch is 100 samples in steps of 20."""
    log = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    return RankZeroReporter(log, epochs=2, samples=100, global_batch_size=20, log_every=1, stream=io.StringIO())


def said(reporter: RankZeroReporter) -> list[str]:
    stream = reporter.stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12344, "0.1234"),
        (0.0, "0.0000"),
        (0.001, "0.0010"),
        (999_999.0, "999999.0000"),
        (0.00042, "4.200e-04"),
        (3.2e-9, "3.200e-09"),
        (-3.2e-9, "-3.200e-09"),
        (1e30, "1.000e+30"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_loss_of_any_size_shows_its_digits(value: float, text: str) -> None:
    assert shown(value) == text


def test_a_step_without_weight_has_no_loss(reporter: RankZeroReporter, records: Any) -> None:
    reporter.steps(records([1.0, 1.0], samples=20, losses=[math.nan, math.nan], weightless=[True, False]))
    assert [line.partition("Loss: ")[2] for line in said(reporter)] == ["none, it has no weight", "nan"]


def test_each_step_has_a_number_of_its_own_also_after_steps_of_another_size(
    reporter: RankZeroReporter, records: Any
) -> None:
    reporter.steps(records([1.0] * 3, samples=20, begin=3, cursor=30))  # after three steps of 10
    reporter.steps(records([1.0], samples=10, begin=6, cursor=90))  # the rest
    numbers = [re.findall(r"Step \[(\d+)/(\d+)\]", line)[0] for line in said(reporter)]
    assert numbers == [("2", "5"), ("3", "5"), ("4", "5"), ("5", "5")]


def test_who_waits_is_not_called_slow(records: Any) -> None:
    line = phase_line([records([10.0], seconds=UNEVEN, between=[0.0, 0.0])])
    assert line.endswith("; slowest in forward: rank 1")


def test_shares_are_of_all_the_time_and_one_rank_is_not_the_slowest(records: Any) -> None:
    line = phase_line([records([8.0], seconds=[[[1.0, 2.0, 2.0, 0.0, 1.0]]], between=[2.0])])
    assert line == "data 12%, forward 25%, backward 25%, sync 0%, optimizer 12%, between steps 25%"


def test_the_time_line_says_of_which_steps_it_is(reporter: RankZeroReporter, records: Any) -> None:
    reporter.steps(records([1.0] * 3, samples=20, begin=2, cursor=40))  # resumed in the middle of an epoch
    reporter.epoch(0, EpochSums(1.0, 1.0, 100, 5.0))
    assert said(reporter)[-2] == "Epoch [1/2] finished in 5.00s. Average Loss: 1.0000"
    assert said(reporter)[-1].startswith("  time since step 3: data ")


def test_steps_that_a_rewind_does_again_count_once(reporter: RankZeroReporter, records: Any) -> None:
    def steps(begin: int, data: float) -> Any:
        return records([1.0], samples=20, begin=begin, seconds=[[[data, 1.0, 0.0, 0.0, 0.0]]])

    for begin, data in ((0, 1.0), (1, 99.0), (1, 1.0), (2, 1.0)):
        reporter.steps(steps(begin, data))
    reporter.epoch(0, EpochSums(1.0, 1.0, 60, 3.0))
    assert said(reporter)[-1].startswith("  time: data 50%, forward 50%, ")


def test_a_run_with_nothing_left_is_resumed_in_its_last_epoch(reporter: RankZeroReporter) -> None:
    reporter.resumed(5, 1, "step-00000005")
    reporter.resumed(10, 2, "step-00000010")
    assert said(reporter) == [
        "Resumed at epoch 2, step 5, from step-00000005",
        "Resumed at epoch 2, step 10, from step-00000010",
    ]
