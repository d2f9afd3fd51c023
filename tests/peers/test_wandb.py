"""Weights & Biases without a network: runs of its offline mode, read back from the file that it would upload."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RECIPE = Path(__file__).resolve().parent.parent / "train" / "recipes" / "small.py"
FLAGS = ("--run-dir", "run", "--log-every", "2", "--checkpoint-every", "4", "--shards", "2")
TRACKED = ("--trackers", "wandb")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
_BLOCK, _HEADER = 32768, 7  # LevelDB's log: blocks of records, a checksum, a length and a kind before each


@pytest.fixture
def trained(rank_server, tmp_path):
    pytest.importorskip("wandb")

    def run(*flags, cwd="job", ranks=1, trackers=TRACKED, **environ):
        environ = OFFLINE | environ
        ended = rank_server(tmp_path / cwd, RECIPE, *FLAGS, *trackers, *flags, ranks=ranks, env=environ, seconds=200)
        assert ended.codes == [0] * ranks, ended.stderrs
        return ended

    return run


def payloads(content: bytes):
    """The records of a file, each whole."""
    assert content[:4] == b":W&B"
    at, parts = _HEADER, b""
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + _HEADER])
        parts += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # full, or last of several
            yield parts
            parts = b""


def uploads(run_dir: Path):
    """For each offline run in order of time: its id, and the points of each curve."""
    from wandb.proto import wandb_internal_pb2 as written

    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run_id, curves = "", defaultdict(list)
        for payload in payloads(path.read_bytes()):
            record: Any = vars(written)["Record"].FromString(payload)
            run_id = record.run.run_id or run_id
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name, value in values.items():
                if not name.startswith("_"):
                    curves[name].append((record.history.step.num, json.loads(value)))
        found.append((run_id, dict(curves)))
    return found


def test_an_offline_run_has_the_runs_own_losses_and_changes_no_bit(trained):
    plain = trained("--max-steps", "9", trackers=(), cwd="plain")
    ended = trained("--max-steps", "9", ranks=2)
    assert ended.bits == plain.bits
    assert ended.events("warning") == []
    ((_, curves),) = uploads(ended.run_dir)  # one: rank zero alone has trackers
    losses = {event["step"]: event["loss"] for event in ended.events("step")}
    assert curves["train/loss"] == [(step, losses[step]) for step in (2, 4, 6, 9)]
    assert curves["eval/loss"] == [(event["step"], event["metrics"]["loss"]) for event in ended.events("eval")]
    assert [step for step, _ in curves["epoch/loss"]] == [7]


def test_a_run_that_goes_on_is_the_same_one_and_has_no_point_twice(trained):
    first = trained("--max-steps", "7")
    for path in sorted(first.checkpoint.rglob("*"), reverse=True):
        path.unlink()
    first.checkpoint.rmdir()  # as if it had died before that: steps 5 to 7 are done again
    ended = trained("--max-steps", "10")
    assert [event["step"] for event in ended.events("resumed")] == [4]
    whole = trained("--max-steps", "10", cwd="whole")
    (before_id, before), (after_id, after) = uploads(ended.run_dir)
    ((_, expected),) = uploads(whole.run_dir)
    assert before_id == after_id
    for name in ("train/loss", "eval/loss", "epoch/loss"):
        assert before.get(name, []) + after.get(name, []) == expected[name]


def test_a_server_that_is_not_there_costs_a_warning(trained):
    where = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    ended = trained("--max-steps", "4", WANDB_MODE="online", **where)
    (text,) = [event["text"] for event in ended.events("warning")]
    assert text.startswith("tracker wandb failed (")
    assert text.endswith("it gets no more points")
