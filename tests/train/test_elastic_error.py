"""torchrun's own classes read what a failed rank leaves, and call the right one the root cause."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from samestep.launcher.contract import ENV_LAUNCHED, ErrorRecord, RunDir, UsageError, WorkerEnv
from samestep.train import elastic_error, leave

SECOND = 1_000_000_000


def failed(message: str = "boom", time_ns: int = 7 * SECOND + 1, **other: object) -> ErrorRecord:
    record = leave.error_record(ValueError(message), 1, 0, 3, "forward")
    return replace(record, frame="r.py:20 in loss", time_ns=time_ns, **other)  # type: ignore[arg-type]


def shown(folder: Path, *records: ErrorRecord) -> str:
    """The block that torchrun ends with, where its ranks have left these records."""
    failures = {}
    for rank, record in enumerate(records):
        path = folder / f"{rank}.json"
        elastic_error.write(record, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(path)})
        failures[rank] = ProcessFailure(rank, 1000 + rank, record.exit_code, str(path))
    return str(ChildFailedError("r.py", failures)).partition("Root Cause")[2]


def test_torchrun_shows_the_cause_and_its_place(tmp_path: Path) -> None:
    text = shown(tmp_path, failed("boom\nand more"))
    assert "traceback : ValueError: boom\n  and more\n  at r.py:20 in loss, step 4, phase forward\n" in text


def test_torchrun_shows_a_mistake_in_usage_with_its_hint(tmp_path: Path) -> None:
    text = shown(tmp_path, leave.error_record(UsageError("what", "how"), 0, 0, 0, "joining"))
    assert "exitcode  : 2" in text
    assert "traceback : what\n  hint: how\n" in text


def test_the_root_cause_is_not_a_rank_that_only_followed_in_the_same_second(tmp_path: Path) -> None:
    text = shown(tmp_path, failed(time_ns=7 * SECOND + 9, consequence=True), failed())
    assert "rank      : 1 (local_rank: 1)" in text
    assert "ValueError: boom" in text


def test_nothing_is_written_where_no_agent_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    for environ in ({}, {"TORCHELASTIC_RUN_ID": "x", ENV_LAUNCHED: "1"}):
        elastic_error.write(failed(), {"TORCHELASTIC_ERROR_FILE": str(path), **environ})
    elastic_error.write(failed(), {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": ""})
    assert not path.exists()


@pytest.mark.parametrize("below_agent", [True, False])
def test_without_a_run_directory_a_mistake_is_told_at_once_and_by_one_rank_of_an_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below_agent: bool
) -> None:
    def asked(*_: object) -> bool:
        raise AssertionError("nobody can have written anything there")

    monkeypatch.setattr(leave, "said_by_rank_zero", asked)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv(ENV_LAUNCHED, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if below_agent else "")
    record = leave.error_record(UsageError("what", "how"), 1, 0, 0, "joining")
    told = [
        leave.is_to_tell(record, WorkerEnv(rank=rank, world_size=2, local_rank=rank), RunDir(tmp_path / "run"))
        for rank in (0, 1)
    ]
    assert told == [True, not below_agent]
    assert (tmp_path / "error.json").exists() == below_agent
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_torchrun_names_the_rank_that_raised_and_what(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os\n"
        "from samestep.train import train\n"
        "def build(config):\n"
        "    raise KeyError('rank ' + os.environ['RANK'])\n"
        "train(build)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(recipe)]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    told = f"traceback : KeyError: 'rank 0'\n  at {recipe}:4 in build, phase build"
    assert told in done.stderr.partition("Root Cause")[2]
    kept = json.loads((tmp_path / "runs" / "recipe" / "errors" / "rank-0.json").read_text())
    assert kept["kind"] == "KeyError"
