"""--profile: one file of all ranks, nothing else, and the bits of a run without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from samestep.launcher.contract import UsageError
from samestep.launcher.heartbeat import NoPulse
from samestep.train import TrainConfig
from samestep.train.observe import profile
from samestep.train.parallel.group import SoloGroup

pytestmark = pytest.mark.timeout(120)
FLAGS = ("--shards", 4, "--max-steps", 9)


def events(run_dir: Path) -> list[dict[str, Any]]:
    with gzip.open(run_dir / "profile.json.gz", "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def of_rank(found: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    (pid,) = {e["pid"] for e in found if e["name"] == "process_name" and e["args"]["name"] == f"rank {rank}"}
    return [e for e in found if e["pid"] == pid and e["ph"] == "X"]


@pytest.mark.compiler
def test_a_profile_holds_steps_and_phases_of_all_ranks_on_one_clock_and_changes_no_bits(trained: Any) -> None:
    plain = trained("small", *FLAGS, ranks=2, cwd="plain")
    run = trained("small", *FLAGS, "--profile", 5, ranks=2, cwd="profiled")
    assert run.bits == plain.bits
    found = events(run.run_dir)
    spans = []
    for rank in (0, 1):
        mine = of_rank(found, rank)
        phases = [e for e in mine if e.get("cat") == "phase"]
        steps = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in phases if e["name"].startswith("step ")}
        assert list(steps) == [f"step {number}" for number in range(4, 9)]
        within = {e["name"] for e in phases} - steps.keys()
        assert within >= {"data", "forward", "backward", "sync", "optimizer", "evaluation"}
        forwards = [(e["ts"], e["ts"] + e["dur"]) for e in phases if e["name"] == "forward"]
        assert len(forwards) == 5 * 2, "two shards a rank"
        losses = [e["ts"] for e in mine if e["name"] == "aten::mse_loss"]
        inside = [any(begin <= ts <= end for begin, end in forwards) for ts in losses]
        assert inside.count(True) >= 5 * 2, "operators and phases are on the same clock"
        spans.append(steps)
    for name, (begin, end) in spans[0].items():
        other = spans[1][name]
        assert max(begin, other[0]) < min(end, other[1]), "ranks wait for each other in every step"
    assert {p.name for p in run.run_dir.iterdir()} == {p.name for p in plain.run_dir.iterdir()} | {"profile.json.gz"}
    assert f"Profiled steps 4 to 8: {run.run_dir / 'profile.json.gz'}" in run.stdout
    assert "USDT" not in run.stderrs


@pytest.mark.compiler
def test_a_run_that_ends_early_writes_the_steps_there_were_and_a_resumed_one_skips_three_again(trained: Any) -> None:
    first = trained("small", "--max-steps", 5, "--profile", 10)
    assert "Profiled steps 4 to 5" in first.stdout
    short = trained("small", "--max-steps", 7, "--profile", 10)
    assert "Nothing was profiled" in short.stdout
    again = trained("small", "--max-steps", 11, "--profile", 10)
    assert "Profiled steps 11 to 11" in again.stdout
    names = {e["name"] for e in events(again.run_dir)}
    assert "step 11" in names
    assert "step 4" not in names, "an earlier profile is replaced"


@pytest.mark.slow
def test_a_profile_that_cant_be_written_costs_no_run(trained: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "job" / "run"
    (run_dir / "profile.json.gz").mkdir(parents=True)
    run = trained("small", *FLAGS, "--profile", 2, ranks=2)
    assert "could not write it: Is a directory" in run.stdout
    assert not (run_dir / ".profile-parts").exists()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="--profile is expected to be at least 1"):
        TrainConfig(profile=0)
    with pytest.raises(UsageError, match="without --replay"):
        TrainConfig(profile=1, replay=3)


def test_the_time_of_the_profiler_itself_is_skipped_when_it_begins_and_ends(tmp_path: Path) -> None:
    said, skipped = list[str](), list[int]()
    pulse = profile.around(NoPulse(), 2, SoloGroup(), tmp_path, said.append, lambda: skipped.append(step))
    for step in range(8):
        pulse.at(step, "step")
    assert skipped == [3, 5]
    assert [text.partition(":")[0] for text in said] == ["Profiled steps 4 to 5"]
