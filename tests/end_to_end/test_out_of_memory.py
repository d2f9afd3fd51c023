"""A device that runs out of memory costs restarts, in smaller parts, until they fit or nothing gets smaller."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
RECIPE = str(Path(__file__).parents[1] / "train" / "recipes" / "hungry.py")
FLAGS = ("--shards", "2", "--dropout", "0.2")


@pytest.fixture
def fitting(start):
    """The digest of a run that had so many parts from its begin."""
    return lambda parts: start("python", 1, RECIPE, *FLAGS, "--micro-batches", str(parts), run_dir="fits").digest


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_get_smaller_until_they_fit_and_no_restart_is_counted(start, fitting, monkeypatch, ranks):
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    outcome = start("samestep", ranks, RECIPE, *FLAGS, "--room", "1")
    assert outcome.digest == fitting(6)
    assert [event["generation"] for event in outcome.of("restarted")] == [1, 2, 3]  # 2, 4, 6 parts
    assert outcome.stderr.count("the next start cuts each shard's batch into") == 3
    assert "restart 1 of" not in outcome.stderr
    assert [event["cause"].partition(":")[0] for event in outcome.of("worker_failed")] == ["OutOfMemoryError"] * 3


@pytest.mark.slow
def test_torchrun_starts_again_in_smaller_parts(start, fitting, monkeypatch):
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")
    outcome = start("torchrun", 1, RECIPE, *FLAGS, "--room", "3")
    assert outcome.digest == fitting(2)
    assert "ran out of memory: the next start cuts" in outcome.stderr


def test_where_nothing_gets_smaller_the_culprit_is_named(start):
    outcome = start("samestep", 2, RECIPE, *FLAGS, "--room", "0", "--on-rank", "1", status=77)
    assert len(outcome.of("restarted")) == 4  # three in smaller parts, and one that could have been luck
    assert "samestep: rank 1 failed: OutOfMemoryError: CUDA out of memory" in outcome.stderr
    assert "hint: 6 micro-batches a shard are as many as its samples allow" in outcome.stderr
    assert json.loads((outcome.run_dir / "config.json").read_text())["micro_batches"] == 6
