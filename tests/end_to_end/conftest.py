"""Starts runs as a user would: any recipe under any of the four launchers, from an empty folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
LAUNCHERS = ("python", "torchrun", "accelerate", "samestep")


@dataclass(frozen=True)
class Outcome:
    """What one start left behind."""

    returncode: int
    stdout: str
    stderr: str
    run_dir: Path

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    def of(self, name: str) -> list[dict]:
        return [event for event in self.events if event["event"] == name]

    @property
    def digest(self) -> str:
        return self.of("run_finished")[-1]["digest"]

    @property
    def losses(self) -> list[tuple[int, str]]:
        return [(event["step"], event["loss_hex"]) for event in self.of("step")]

    @property
    def newest(self) -> Path:
        return sorted((self.run_dir / "checkpoints").glob("step-*"))[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, world_size: int, recipe: Path) -> list[str]:
    port = str(free_port())
    return {
        "python": [str(BIN / "python"), str(recipe)],
        "torchrun": [str(BIN / "torchrun"), "--master-port", port, f"--nproc-per-node={world_size}", str(recipe)],
        "accelerate": [
            *[str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(world_size)],
            *["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
            *["--main_process_port", port, str(recipe)],
        ],
        "samestep": [str(BIN / "samestep"), "run", "--nproc-per-node", str(world_size), str(recipe)],
    }[launcher]


def environment() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks and not name.startswith("SAMESTEP")}
    return kept | {"PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def start_command() -> Callable[..., list[str]]:
    """Words of a start without starting it: to be put below another program."""
    return lambda launcher, world_size, recipe, *flags: [*command(launcher, world_size, RECIPES / recipe), *flags]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Outcome]:
    """`start(launcher, world_size, recipe, *flags, run_dir=...)` runs to the end; a failure shows what was printed."""

    def run(launcher: str, world_size: int, recipe: str, *flags: str, run_dir: str = "run", status: int = 0) -> Outcome:
        assert launcher != "python" or world_size == 1
        path = tmp_path / run_dir
        script = RECIPES / recipe if not Path(recipe).is_absolute() else Path(recipe)
        argv = [*command(launcher, world_size, script), *flags, "--run-dir", str(path)]
        done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == status, f"{argv}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return Outcome(done.returncode, done.stdout, done.stderr, path)

    return run
