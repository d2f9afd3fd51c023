"""Other people's programs under `samestep run`: what works under torchrun works here, with the same flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).resolve().parent.parent / "workers"


def samestep(cwd: Path, *words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samestep.launcher", "run", "--nproc-per-node", "2", *map(str, words)],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_script", "test_ops"])
def test_accelerates_own_programs_pass(name, tmp_path):
    ended = samestep(tmp_path, "-m", f"accelerate.test_utils.scripts.{name}", ACCELERATE_USE_CPU="true")
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 20])
def test_hand_written_ddp_script_trains_time_after_time(times, tmp_path):
    for _ in range(times):
        ended = samestep(tmp_path, WORKERS / "ddp_plain.py")
        assert (ended.returncode, ended.stdout) == (0, "trained on 2 ranks, restart 0\n"), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_culprit_of_a_hand_written_ddp_script_is_named(rank, tmp_path):
    ended = samestep(tmp_path, WORKERS / "ddp_plain.py", "--fail-rank", str(rank))
    assert ended.returncode == 1
    assert f"samestep: rank {rank} failed: ValueError: bad sample on rank {rank}" in ended.stderr
    assert "ddp_plain.py:19 in main" in ended.stderr


@pytest.mark.slow
def test_recipes_store_lives_on_the_socket_that_was_handed_over(tmp_path):
    ended = samestep(tmp_path, WORKERS / "store_on_fd.py")
    assert (ended.returncode, ended.stdout) == (0, "met\n"), ended.stderr
