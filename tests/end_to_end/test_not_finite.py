"""P5, P6: a loss that is NaN ends a run once, with rank, step and samples named; no restart would change it."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
POISONED = Path(__file__).parents[1] / "train" / "recipes" / "poisoned.py"


def test_it_is_named_once_and_not_started_again(start, monkeypatch):
    monkeypatch.setenv("POISON", "input:37")
    outcome = start("samestep", 2, str(POISONED), "--shards", "4", "--checkpoint-every", "1", status=1)
    (record,) = (outcome.run_dir / "errors").glob("not-finite-step-*.json")
    about = json.loads(record.read_text())
    (rank,) = about["ranks"]
    assert f"samestep: rank {rank} failed: RefusedStepError: the loss of step {about['step']}" in outcome.stderr
    assert "37" in outcome.stderr
    assert "exit code 1" in outcome.stderr
    assert "hint: look at these samples" in outcome.stderr
    assert "; restart " not in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not outcome.of("restarted")
    assert outcome.newest.name == f"step-{about['step'] - 1:08d}"
