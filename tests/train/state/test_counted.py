"""Restarts and the share of useful time, recomputed from the events of a run directory."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def counted_since(ended: Any) -> float:
    """The moment from which goodput must have been counted, for the steps there are and the number that was told."""
    finished = ended.events("run_finished")[-1]
    useful = sum(event["samples"] / event["samples_per_s"] for event in ended.events("step"))
    return float(finished["time"] - useful / finished["goodput"])


def test_a_start_that_failed_before_any_checkpoint_counts_too(start: Any, trained: Any) -> None:
    failed = start("small", "--run-dir", "run", env={"FAULT": "raise"})
    assert failed.codes == [1]
    ended = trained("small")
    (first,), (second,) = ended.events("run_started"), ended.events("restarted")
    assert (second["generation"], ended.events("run_finished")[-1]["restarts"]) == (1, 1)
    assert first["time"] - 0.001 < counted_since(ended) < second["time"]


def test_a_run_that_begins_with_another_ones_checkpoint_counts_its_own_time(trained: Any) -> None:
    first = trained("small", "--max-steps", 5, cwd="first")
    ended = trained("small", "--resume", first.checkpoint, cwd="second")
    assert [event["generation"] for event in ended.events("run_started")] == [0]
    assert ended.events("run_finished")[-1]["restarts"] == 0
    assert counted_since(ended) > first.events("run_finished")[-1]["time"]
