"""`--resume PATH` and `never` say where a run begins: once, however often its launcher or its user starts it again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from samestep.launcher.contract import RunDir, UsageError
from samestep.train.state import resume
from samestep.train.state.checkpoint import Snapshot, commit
from samestep.train.state.resume import Begun, settle

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small.py"
EVERY = ("--checkpoint-every", "3", "--shards", "2", "--keep-checkpoints", "9")
ELASTIC = {"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "0"}
LATER = ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}
JOB = {"SLURM_JOB_ID": "7"}
REQUEUED = JOB | {"SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def go(rank_server, tmp_path):
    def start(*flags, folder="here", code=0, **env):
        ended = rank_server(tmp_path / folder, RECIPE, "--run-dir", "run", *flags, env=env)
        assert set(ended.codes) == {code}, ended.stderrs
        return ended

    return start


@pytest.fixture
def run_dir(tmp_path):
    """A run that began with the checkpoint of step 4 and has saved step 6 since."""
    run_dir = RunDir(tmp_path / "run")
    save(run_dir, 4)
    save(run_dir, 6)
    return run_dir


def save(run_dir, step, value=0):
    return commit(Snapshot(step, {}, {}, {"events_offset": 0, "value": value}, {"shards": 1}), run_dir, 0, 9)


def begin(run_dir, start, environ):
    begun = Begun.here(str(start), environ)
    run_dir.config.write_text(json.dumps({"begun": {"resume": begun.resume, "launch": begun.launch, "job": begun.job}}))


@pytest.mark.parametrize(("first", "later"), [(ELASTIC, LATER), (JOB, REQUEUED), (ELASTIC | JOB, LATER | JOB)])
def test_a_later_start_of_the_same_launch_goes_on_from_the_newest(run_dir, first, later):
    for start in (str(run_dir.checkpoint(4)), "/of/another/run/checkpoints/step-00000003", "never"):
        begin(run_dir, start, first)
        assert settle(run_dir, start, later) == ("auto", "")


def test_never_typed_again_is_refused_also_in_the_restarts_that_a_launcher_makes_of_the_refusal(run_dir):
    begin(run_dir, "never", ELASTIC)
    for environ in ({}, ELASTIC, LATER | {"TORCHELASTIC_RUN_ID": "another"}, REQUEUED):
        assert settle(run_dir, "never", environ) == ("never", "")
    begin(run_dir, "auto", ELASTIC)
    assert settle(run_dir, "never", LATER) == ("never", "")


def test_launches_without_an_id_of_their_own_are_told_apart_by_their_agent(run_dir, monkeypatch):
    begin(run_dir, "never", ELASTIC | {"TORCHELASTIC_RUN_ID": "none"})
    assert settle(run_dir, "never", LATER | {"TORCHELASTIC_RUN_ID": "none"}) == ("auto", "")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert settle(run_dir, "never", LATER | {"TORCHELASTIC_RUN_ID": "none"}) == ("never", "")


def test_without_a_checkpoint_since_the_path_is_where_it_begins_again(run_dir, tmp_path):
    newest = str(run_dir.checkpoint(6))
    begin(run_dir, newest, ELASTIC)
    assert settle(run_dir, newest, LATER) == (newest, "")
    empty = RunDir(tmp_path / "empty")
    empty.path.mkdir()
    begin(empty, newest, ELASTIC)
    assert settle(empty, newest, LATER) == (newest, "")


def test_another_path_is_another_beginning(run_dir):
    begin(run_dir, run_dir.checkpoint(4), ELASTIC)
    other = str(run_dir.checkpoint(2))
    assert settle(run_dir, other, LATER) == (other, "")


def test_checkpoints_that_were_set_aside_before_are_kept_when_more_are(run_dir):
    for value in (1, 2, 3):
        resume.look(run_dir, str(run_dir.checkpoint(4)), {})
        save(run_dir, 6, value)
    asides = ("step-00000006.superseded", "step-00000006.superseded-2", "step-00000006.superseded-3")
    states = [json.loads((run_dir.checkpoints / name / "state.json").read_text())["value"] for name in asides]
    assert states == [0, 1, 2]


def test_a_run_with_checkpoints_of_its_own_does_not_go_on_from_another_runs(run_dir, tmp_path):
    other = save(RunDir(tmp_path / "other"), 5)
    with pytest.raises(UsageError, match="which has 2 of its own, but is") as refused:
        resume.look(run_dir, str(other), {})
    assert "--run-dir" in refused.value.hint
    aside = run_dir.checkpoint(6).rename(run_dir.checkpoints / "step-00000006.superseded")
    with pytest.raises(UsageError, match="which has 1 of its own, but is"):
        resume.look(run_dir, str(aside), {})
    begin(run_dir, other, {})
    assert resume.look(run_dir, str(other), {})["path"] == str(run_dir.checkpoint(4))


def test_the_same_path_again_is_gone_on_from_unless_the_run_has_ended_in_its_own_directory(run_dir):
    older = str(run_dir.checkpoint(4))
    begin(run_dir, older, {})
    assert settle(run_dir, older, {})[0] == "auto"
    run_dir.events.write_text('{"event": "run_finished", "steps": 6}\n')
    assert settle(run_dir, older, {}) == (older, "")


def test_the_same_command_again_goes_on_from_the_newest_and_says_so_in_one_line(go, tmp_path):
    whole = go(*EVERY, folder="whole")
    go(*EVERY, "--max-steps", "6", folder="first")
    path = tmp_path / "first" / "run" / "checkpoints" / "step-00000006"
    go("--resume", path, *EVERY, "--max-steps", "9", folder="second")
    again = go("--resume", path, *EVERY, folder="second")
    assert again.digest == whole.digest
    assert [event["checkpoint"] for event in again.events("resumed")] == ["step-00000006", "step-00000009"]
    assert f"--resume {path}: the run was begun there before, and goes on from what it has saved since" in again.stdout
    assert [event["step"] for event in again.events("step")] == list(range(7, 15))
    assert f"Already finished: 14 steps, digest {whole.digest}" in go("--resume", path, folder="second").stdout


def test_an_older_checkpoint_typed_after_the_end_begins_there_once_more(go, tmp_path):
    go(*EVERY)
    older = tmp_path / "here" / "run" / "checkpoints" / "step-00000012"
    for number in ("", "-2"):
        go("--resume", older, *EVERY)
        assert (older.parent / f"step-00000014.superseded{number}").is_dir()


def test_shards_are_those_of_the_checkpoint_that_a_run_begins_with_whatever_was_in_the_directory(go, tmp_path):
    whole = go("--shards", "1", folder="whole")
    go("--shards", "1", "--max-steps", "6", folder="first")
    path = tmp_path / "first" / "run" / "checkpoints" / "step-00000006"
    refused = go("--shards", "4", "--resume", path, folder="second", code=2)
    assert "--shards is expected to stay 1" in refused.stderr
    (refused.run_dir / "config.json").write_text('{"shards": 4}')
    taken = go("--resume", path, folder="second")
    assert taken.digest == whole.digest
    (taken.run_dir / "config.json").write_text('{"shards": 4}')
    changed = go("--epochs", "3", folder="second", code=2)
    assert "shards is expected to be as in step-00000014, but changed from 1 to 4" in changed.stderr


def test_a_run_that_is_told_to_go_on_from_another_ones_checkpoint_keeps_its_own(go, tmp_path):
    other = go("--max-steps", "5", folder="first")
    own = go(*EVERY, "--max-steps", "6", folder="second")
    refused = go("--resume", other.checkpoint, *EVERY, folder="second", code=2)
    assert "which has 2 of its own" in refused.stderr
    assert refused.digest == own.digest
