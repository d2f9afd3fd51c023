"""One step of a run once more, on one process, with the same samples and the same bits, in a folder of its own.

Whatever a step does is a function of the state before it, the seed and its number; so a replay is a run that begins
with the newest checkpoint before the step and ends after it, in a shadow of the run directory that is then removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pdb
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from samestep.launcher import manifest
from samestep.launcher.contract import ENV_PDB, RunDir, UsageError
from samestep.launcher.heartbeat import Device, Pulse
from samestep.train.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def settings(config: Config) -> Config:
    """The run's own, but for what would refuse a state that is there or tell other programs of steps a second time."""
    return replace(config, resume="auto", trackers="")


@contextlib.contextmanager
def shadow(run_dir: RunDir, step: int, world_size: int) -> Iterator[RunDir]:
    """A run directory with what a replay of `step` needs of `run_dir`, which is only read.

    Raises:
        UsageError: there is no such run, it did not get so far, or there are other ranks.
    """
    if world_size > 1:
        raise UsageError(
            f"--replay is expected to run on one process, but there are {world_size}",
            "python recipe.py --replay STEP, with the options of the run: the bits are the same",
        )
    if not run_dir.config.exists():
        raise UsageError(
            f"--replay is expected to be used on a run that exists, but {run_dir.path} holds none",
            "pass the --run-dir of the run, or the working directory it was started from",
        )
    if loss_of(run_dir, step) is None:
        raise UsageError(
            f"--replay is expected to name a step that {run_dir.path} has reached, but is {step}",
            f"tail -n 1 {run_dir.events} tells how far it got",
        )
    before = [folder for folder in manifest.committed(run_dir.checkpoints) if manifest.step_of(folder) < step]
    with tempfile.TemporaryDirectory(prefix="samestep-replay-") as folder:
        replica = RunDir(Path(folder))
        replica.checkpoints.mkdir()
        shutil.copy(run_dir.config, replica.config)
        if before:
            nearest = max(before, key=manifest.step_of)
            shutil.copytree(nearest, replica.checkpoints / nearest.name)
        yield replica


@contextlib.contextmanager
def terminal_for_debugger(debug: bool) -> Iterator[None]:
    """Nothing is drawn over its prompt, as below `samestep run --pdb 0`."""
    if debug:
        os.environ[ENV_PDB] = "0"
    try:
        yield
    finally:
        if debug:
            del os.environ[ENV_PDB]


def loss_of(run_dir: RunDir, step: int) -> str | None:
    """Bits of a step's loss as events.jsonl has them (float.hex), None for a step that it does not tell of."""
    with contextlib.suppress(OSError), run_dir.events.open("rb") as lines:
        for line in lines:
            if b'"step"' in line:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event") == "step" and event.get("step") == step:
                        return str(event["loss_hex"])
    return None


def compare(run_dir: RunDir, replica: RunDir, step: int) -> tuple[bool, str]:
    """Whether the replay came out the same, and that as a sentence."""
    then, now = loss_of(run_dir, step), loss_of(replica, step)
    if then == now and then is not None:
        return True, f"Replayed step {step}: loss {float.fromhex(then):.6g}, the same bits as in the run"
    return False, (
        f"Replayed step {step}: the loss is {now}, but was {then} in the run: code, options, data or environment are "
        "not what they were"
    )


@dataclass(slots=True)
class Debugger:
    """Enters pdb when `step` is about to run; otherwise the pulse that it stands for."""

    step: int
    inner: Pulse
    pdb: pdb.Pdb = field(default_factory=pdb.Pdb)

    def count_by(self, collectives: Callable[[], int]) -> None:
        """As without a debugger."""
        self.inner.count_by(collectives)

    def follow(self, device: Device) -> None:
        """As without a debugger."""
        self.inner.follow(device)

    def at(self, step: int, phase: str) -> None:
        """Something begins."""
        self.inner.at(step, phase)
        if phase == "step" and step == self.step - 1:
            self.pdb.set_trace(sys._getframe(2))  # the loop, above progress and this

    def enter(self, phase: str) -> None:
        """A phase inside a step begins."""
        self.inner.enter(phase)
