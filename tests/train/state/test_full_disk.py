"""A full disk stops nothing, is told of once, and leaves nothing half-written. The limits on files are the kernel's."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir
from samestep.train.observe.event_log import EventLog
from samestep.train.state.checkpoint import Snapshot, commit
from samestep.train.state.export import export_weights
from samestep.train.state.resume import cut_events

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small.py"


@pytest.fixture
def go(rank_server, tmp_path):
    def start(*flags, fault="", ranks=1, code=0):
        ended = rank_server(tmp_path / "here", RECIPE, "--run-dir", "run", *flags, ranks=ranks, env={"FAULT": fault})
        assert set(ended.codes) == {code}, ended.stderrs
        return ended

    return start


def test_weights_that_do_not_fit_are_an_os_error_and_leave_nothing(tmp_path, limit):
    run_dir, model = RunDir(tmp_path), torch.nn.Linear(200, 200)
    path = tmp_path / "weights.safetensors"
    export_weights(model, path)
    before = path.read_bytes()
    commit(Snapshot(1, {}, {}, {}, {}), run_dir, 0, 2)
    limit(50_000)
    with pytest.raises(OSError, match="File too large") as raised:
        commit(Snapshot(2, model.state_dict(), {}, {}, {}), run_dir, 0, 2)
    assert raised.value.errno == errno.EFBIG
    assert [folder.name for folder in run_dir.checkpoints.iterdir()] == ["step-00000001"]
    with pytest.raises(OSError, match="File too large"):
        export_weights(model, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "weights.safetensors"]


def test_events_are_whole_lines_and_those_that_did_not_fit_come_later(tmp_path, limit):
    log, path = EventLog(tmp_path / "events.jsonl", lambda: 0.0), tmp_path / "events.jsonl"
    log.write([{"event": "note", "text": "a"}])
    whole = path.read_bytes()
    limit(len(whole) + 20)
    for text in "bc":
        log.write([{"event": "note", "text": text}])
        assert (log.problem, path.read_bytes(), log.offset()) == ("File too large", whole, len(whole))
    limit(1 << 20)
    log.write([{"event": "note", "text": "d"}])
    assert log.problem == ""
    assert [json.loads(line)["text"] for line in path.read_bytes().splitlines()] == list("abcd")


def test_events_are_cut_also_where_there_is_no_room_for_a_second_file(tmp_path):
    run_dir = RunDir(tmp_path / "small")
    run_dir.path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run_dir.path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        lines = [json.dumps({"event": "step", "step": step, "filler": "x" * 10_000}) + "\n" for step in range(1, 6)]
        lines.append('{"event": "resumed", "step": 3}\n')
        run_dir.events.write_text("".join(lines))
        cut_events(run_dir, len("".join(lines[:2])), 3)  # the third came late
        assert run_dir.events.read_text() == "".join([*lines[:3], lines[5]])
        assert list(run_dir.path.iterdir()) == [run_dir.events]
    finally:
        subprocess.run(["umount", str(run_dir.path)], check=True)


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_that_do_not_fit_cost_a_warning_each_and_training_goes_on(go, ranks):
    ended = go(
        "--checkpoint-every", "3", "--width", "2000", "--shards", ranks, fault="disk-50000", ranks=ranks, code=77
    )
    assert "the checkpoint of step 12 could not be written (File too large); training goes on" in ended.stderr
    assert "with a checkpoint of step 14, but it was not saved (File too large)" in ended.stderr
    assert "Traceback" not in ended.stderrs
    assert [event["step"] for event in ended.events("step")] == list(range(1, 15))
    assert not list((ended.run_dir / "checkpoints").iterdir())
    assert not (ended.run_dir / "weights.safetensors").exists()


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_events_that_do_not_fit_stop_nothing_are_told_of_once_and_no_failed_checkpoint(go):
    ended = go("--checkpoint-every", "3", "--epochs", "4", fault="disk-5000")
    assert ended.stderr.count("can't be written (File too large); training goes on, and events wait in memory") == 1
    assert "could not be written" not in ended.stderr
    assert [event["step"] for event in ended.events("step")] == list(range(1, 29))
    assert [event["step"] for event in ended.events("checkpoint")] == [*range(3, 28, 3), 28]
    assert ended.events("run_finished")


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_can_not_be_exported_are_a_sentence_and_written_by_the_next_start(go, tmp_path, ranks):
    obstacle = tmp_path / "here" / "run" / "weights.safetensors"
    obstacle.mkdir(parents=True)
    ended = go(ranks=ranks, code=1)
    assert f"{Path('run') / 'weights.safetensors'} is expected to hold the trained weights" in ended.stderr
    assert "Traceback" not in ended.stderrs
    assert manifest.verify(ended.checkpoint) == ""
    obstacle.rmdir()
    assert go(ranks=ranks).digest
    assert obstacle.is_file()
