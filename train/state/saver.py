"""When the state is saved, and by whom: rank zero writes, the other ranks only agree on when."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from samestep.launcher.contract import RunDir
from samestep.train.observe.reporter import Reporter
from samestep.train.parallel.group import Group
from samestep.train.state.checkpoint import Snapshot, commit
from samestep.train.state.train_state import TrainState


@dataclass(slots=True)
class Schedule:
    """Every so many steps or seconds; all ranks get the answer of rank zero's clock."""

    every_steps: int | None
    every_seconds: float | None
    group: Group
    device: torch.device
    now: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.now()

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved. A collective where seconds count."""
        due = self.every_steps is not None and step % self.every_steps == 0
        if self.every_seconds is not None:
            late = torch.tensor([self.now() - self._last >= self.every_seconds], dtype=torch.uint8, device=self.device)
            due |= bool(self.group.gather(late)[0])
        if due:
            self._last = self.now()
        return due


class Saver:
    """What every rank but zero has: the state is checked, somebody else writes it."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def due(self, step: int) -> bool:
        """See Schedule."""
        return self.schedule.due(step)

    def save(self, state: TrainState, reporter: Reporter) -> None:
        """Nothing to write here."""

    def wait(self) -> None:
        """Nothing to wait for."""


class WritingSaver(Saver):
    """Rank zero's: commits checkpoints below the run directory."""

    def __init__(self, schedule: Schedule, run_dir: RunDir, generation: int, keep: int) -> None:
        super().__init__(schedule)
        self.run_dir = run_dir
        self.generation = generation
        self.keep = keep
        self._saved_step: int | None = None

    def save(self, state: TrainState, reporter: Reporter) -> None:
        """Commit the state, unless this step already is."""
        if state.step == self._saved_step or self.run_dir.checkpoint(state.step).exists():
            return
        self._write(state.capture(reporter.offset()), reporter)
        self._saved_step = state.step

    def _write(self, snapshot: Snapshot, reporter: Reporter) -> None:
        begin = time.perf_counter()
        path = commit(snapshot, self.run_dir, self.generation, self.keep)
        reporter.checkpoint(snapshot.step, path, time.perf_counter() - begin)
