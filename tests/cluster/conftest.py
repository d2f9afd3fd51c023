"""Real engines on this machine: Debian's MPIs, a two-node Slurm, hosts in network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import RECIPES, Outcome

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)
SAMESTEP = PYTHON.with_name("samestep")
DIGITS = RECIPES / "digits_cnn.py"
FLAGS = ["--shards", "2", "--epochs", "1", "--threads", "1"]


def need(*tools: str) -> None:
    """Skip with a sentence where a program is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: see Debian's openmpi-bin, mpich, slurmctld, iproute2")


def environment(**more: str) -> dict[str, str]:
    """Nobody has started us as a rank, and no proxy or scheduler of the machine takes part."""
    theirs = ("SAMESTEP_", "PET_", "SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return kept | {"PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"} | more


def call(command: list[object], cwd: Path, seconds: float = 120, **more: str) -> Outcome:
    """Run to the end, in the run directory `run`."""
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=seconds
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr, cwd / "run")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The digits for one epoch at two shards, on one process."""
    outcome = call([PYTHON, DIGITS, *FLAGS, "--run-dir", "run"], tmp_path_factory.mktemp("reference"))
    assert outcome.returncode == 0, outcome.stderr
    return outcome
