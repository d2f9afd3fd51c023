"""When the state is saved, and by whom: rank zero writes in the background, the other ranks only agree on when."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samestep.launcher.contract import RunDir
from samestep.train.observe.reporter import Reporter
from samestep.train.parallel.agreement import Agreement
from samestep.train.state.checkpoint import NotFiniteError, Snapshot, commit
from samestep.train.state.train_state import TrainState

_WAITS_IN_SILENCE = 1.0  # seconds


@dataclass(slots=True)
class Clock:
    """Seconds since the last checkpoint."""

    every_seconds: float | None
    now: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A checkpoint is taken."""
        self._last = self.now()

    def late(self) -> bool:
        """Whether it is time for the next one."""
        return self.every_seconds is not None and self.now() - self._last >= self.every_seconds


@dataclass(slots=True)
class Schedule:
    """Every so many steps or seconds, or because a stop was asked for; the same answer on every rank."""

    every_steps: int | None
    clock: Clock
    agreement: Agreement

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved. A collective after some steps (see Agreement)."""
        due = self.every_steps is not None and step % self.every_steps == 0
        due |= self.agreement.after_step()
        if due:
            self.clock.reset()
        return due


class Saver:
    """What every rank but zero has: somebody else writes."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.problem: OSError | None = None  # for which the last one could not be written

    def due(self, step: int) -> bool:
        """See Schedule."""
        return self.schedule.due(step)

    def save(self, state: TrainState, reporter: Reporter) -> None:
        """Nothing to write here."""

    def tell(self, reporter: Reporter) -> None:
        """Nothing to tell."""

    def wait(self, reporter: Reporter) -> bool:  # noqa: ARG002 (WritingSaver's form)
        """Nothing to wait for."""
        return True

    def close(self, reporter: Reporter) -> None:
        """Nothing to end."""


class CopyBuffers:
    """Host copies of a snapshot's tensors, kept from save to save: only the first clone costs page faults.

    From a GPU they are copied in the order of its stream, before what training launches next, and nobody waits for them
    but who reads them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._there: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when the copies are whole; on any thread."""
        if self._there is not None:
            self._there.synchronize()

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with tensors that training will not touch: whole after `wait`, valid until the next call."""
        live = {f"w/{n}": t for n, t in snapshot.weights.items()} | {f"t/{n}": t for n, t in snapshot.tensors.items()}
        kept = {name: self._buffer(name, tensor) for name, tensor in live.items()}
        for name, tensor in live.items():
            kept[name].copy_(tensor, non_blocking=True)
        device = next((tensor.device for tensor in live.values() if tensor.device.type == "cuda"), None)
        self._there = None if device is None else torch.cuda.current_stream(device).record_event()
        self._kept = kept
        weights = {name: kept[f"w/{name}"] for name in snapshot.weights}
        tensors = {name: kept[f"t/{name}"] for name in snapshot.tensors}
        return replace(snapshot, weights=weights, tensors=tensors)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        known = self._kept.get(name)
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


class WritingSaver(Saver):
    """Rank zero's: copies the state between two steps, and commits it on a thread while training goes on.

    At most one checkpoint is being written; a second `save` waits for the first. One that can't be written (disk full)
    or must not be (not finite) is a warning, and the last good one stays.
    """

    def __init__(
        self,
        schedule: Schedule,
        run_dir: RunDir,
        generation: int,
        keep: int,
        fence: int | None = None,
        seconds_left: Callable[[], float | None] = lambda: None,
    ) -> None:
        super().__init__(schedule)
        self._seconds_left = seconds_left
        self.run_dir = run_dir
        self.generation = generation
        self.fence = fence
        self.keep = keep
        self._copies = CopyBuffers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, float, Future[Path]] | None = None
        self._written: int | None = None  # steps of the last one

    def save(self, state: TrainState, reporter: Reporter) -> None:
        """Begin to commit the state, unless it already is, by us or by the start that it was loaded from."""
        if self._writing is not None and self._writing[0] == state.step:
            return
        begin = time.perf_counter()  # training stands still also while the one before is written
        if not self.wait(reporter):
            return
        if state.step in (self._written, state.loaded_step) and self.run_dir.checkpoint(state.step).exists():
            return
        snapshot = self._copies.copy(state.capture(reporter.offset()))
        protected = {state.best_step} if state.best_step is not None else set()
        where = (self.run_dir, self.generation, self.keep, protected, self.fence)
        written = self._thread.submit(self._write, snapshot, *where)
        self._writing = (state.step, time.perf_counter() - begin, written)

    def _write(self, *what: Any) -> Path:
        self._copies.wait()
        return commit(*what)

    def tell(self, reporter: Reporter) -> None:
        """Report what came of the last one, once that is known."""
        if self._writing is not None and self._writing[2].done():
            self._report(*self._writing, reporter)

    def wait(self, reporter: Reporter) -> bool:
        """True once nothing is being written any more; reports what came of it. False where time is over before."""
        if self._writing is None:
            return True
        if not wait_for_all([self._writing[2]], self._seconds_left()).done:
            return False
        self._report(*self._writing, reporter)
        return True

    def close(self, reporter: Reporter) -> None:
        """End the thread, however the run ended: nothing is written any more when somebody else gets the directory.

        A failure is a warning, since the run may have ended with another one.

        Raises:
            KeyboardInterrupt: who interrupts here does not want to wait.
        """
        self._thread.shutdown(wait=False)  # once what was submitted is done
        if self._writing is None:
            return
        step, stall, written = self._writing
        if not wait_for_all([written], _WAITS_IN_SILENCE).done:
            reporter.note(f"waiting until the checkpoint of step {step} is written (Ctrl-C: not any longer)")
        try:
            self._report(step, stall, written, reporter)
        except Exception as error:  # noqa: BLE001 (whatever a write raises)
            reporter.warning(f"the checkpoint of step {step} could not be written ({error})")

    def _report(self, step: int, stall: float, written: Future[Path], reporter: Reporter) -> None:
        self._writing = self.problem = None
        try:
            folder = written.result()
        except NotFiniteError as error:
            reporter.warning(f"the state after step {step} is not saved: {error}; the last good checkpoint is kept")
        except OSError as error:
            self.problem = error
            reporter.warning(
                f"the checkpoint of step {step} could not be written ({error.strerror or error}); "
                "training goes on with the last good one"
            )
        else:
            self._written = step
            reporter.checkpoint(step, folder, stall)
