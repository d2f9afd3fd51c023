"""`--profile STEPS`: torch.profiler on every rank for some steps, and one file for all ranks that Perfetto opens.

It is told what the launcher is told (see launcher/heartbeat.py), so the loop knows nothing of it. Phases are a row of
their own in the trace and no `record_function`: a phase can begin on another thread than the one before ended on,
and inside of an operator. Profiling changes no bits.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from samestep.launcher.heartbeat import Device, Pulse
from samestep.train.observe.clocks import measure_offsets
from samestep.train.observe.trace import Mark, Place, part
from samestep.train.parallel.group import Group, gather_json

NAME = "profile.json.gz"  # in the run directory
PARTS = ".profile-parts"
SKIPPED_STEPS = 3  # of each start: they allocate, choose kernels, and are watched by --check
_QUIET = "6"  # torch 2.13 prints two lines to stderr at each start and stop below it


def around(
    pulse: Pulse,
    steps: int | None,
    group: Group,
    folder: Path,
    say: Callable[[str], None],
    skip: Callable[[], None] = lambda: None,
) -> Pulse:
    """A pulse that profiles too; `pulse` itself where no steps are asked for.

    `say` is told how it ended; `skip` is called when time has passed that no step has taken.
    """
    return pulse if steps is None else Profile(pulse, steps, group, folder, say, skip)


@dataclass(slots=True)
class _Window:
    """What is recorded while it is open."""

    profiler: Any
    begin: int  # steps completed when it opened
    place: Place
    marks: list[Mark] = field(default_factory=list)


@dataclass(slots=True)
class Profile:
    """Records `steps` steps after the first SKIPPED_STEPS of this start, or those there are, then writes the file.

    Every rank opens and closes its window between the same steps; both are collectives. A run that fails or is stopped
    inside of the window leaves no file.
    """

    inner: Pulse
    steps: int
    group: Group
    folder: Path
    say: Callable[[str], None]
    skip: Callable[[], None]
    now: Callable[[], int] = time.time_ns
    _first: int | None = None
    _window: _Window | None = None
    _done: bool = False

    def count_by(self, collectives: Callable[[], int]) -> None:
        """As without a profile."""
        self.inner.count_by(collectives)

    def follow(self, device: Device) -> None:
        """As without a profile."""
        self.inner.follow(device)

    def at(self, step: int, phase: str) -> None:
        """Something begins, `step` steps are done: the window opens before a step and closes after one."""
        if not phase:
            self._drop()
        elif self._window is not None and (step >= self._window.begin + self.steps or phase == "closing"):
            self.inner.at(step, "profile")
            self._close(self._window, step)
            self.skip()
        elif phase == "closing" and not self._done:
            self.say(f"Nothing was profiled: --profile leaves out the first {SKIPPED_STEPS} steps, and no more came")
        elif phase == "step":
            self._first = step if self._first is None else self._first
            if self._window is None and not self._done and step >= self._first + SKIPPED_STEPS:
                self.inner.at(step, "profile")
                self._open(step)
                self.skip()
        self.inner.at(step, phase)
        self._mark(0, f"step {step + 1}" if phase == "step" else phase)

    def enter(self, phase: str) -> None:
        """A phase inside a step begins."""
        self.inner.enter(phase)
        self._mark(1, phase)

    def _mark(self, depth: int, name: str) -> None:
        if self._window is not None:
            self._window.marks.append(Mark(self.now(), depth, name))

    def _open(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        offsets = measure_offsets(self.group, self.now)
        base = gather_json(self.group, self.now())[0]
        place = Place(self.group.rank, self.group.world_size, base, offsets[self.group.rank])
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._window = _Window(profile(activities=kinds), step, place)
        self._window.profiler.start()

    def _close(self, window: _Window, step: int) -> None:
        self._window, self._done = None, True
        window.profiler.stop()
        problems = gather_json(self.group, self._write(window, self.now()))
        if self.group.rank == 0 and not any(problems):
            problems[0] = _or_problem(lambda: merge(self.folder, self.group.world_size))
        self.group.barrier()  # nobody's next step waits for rank zero
        _or_problem(lambda: self._part(self.group.rank).unlink(missing_ok=True))
        self.group.barrier()
        _or_problem(self._part(0).parent.rmdir)
        problem = next(filter(None, problems), "")
        profiled = f"Profiled steps {window.begin + 1} to {step}"
        self.say(f"{profiled}, but could not write it: {problem}" if problem else f"{profiled}: {self.folder / NAME}")

    def _write(self, window: _Window, end: int) -> str:
        path = self._part(window.place.rank)

        def write() -> None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            window.profiler.export_chrome_trace(str(path))
            recorded = json.loads(path.read_bytes())
            with path.open("w", encoding="utf-8") as file:
                file.writelines(
                    f",\n{json.dumps(event)}" for event in part(recorded, os.getpid(), window.marks, end, window.place)
                )

        return _or_problem(write)

    def _drop(self) -> None:
        """Training has ended in the middle of the window."""
        window, self._window, self._done = self._window, None, True
        if window is not None:
            window.profiler.stop()

    def _part(self, rank: int) -> Path:
        return self.folder / PARTS / f"rank-{rank}.json"


def _or_problem(act: Callable[[], None]) -> str:
    """Why a file could not be written: a profile is not worth a run."""
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def merge(folder: Path, world_size: int) -> None:
    """The parts of all ranks as one file, whole or not at all; raises OSError."""
    temporary = folder / PARTS / NAME
    try:
        with gzip.open(temporary, "wb", compresslevel=5) as out:
            _write_all(out, [folder / PARTS / f"rank-{rank}.json" for rank in range(world_size)])
        temporary.replace(folder / NAME)
    finally:
        temporary.unlink(missing_ok=True)


def _write_all(out: gzip.GzipFile, parts: list[Path]) -> None:
    first = {"ph": "M", "pid": 0, "tid": 0, "name": "process_labels", "args": {"labels": "samestep"}}
    out.write(b'{"displayTimeUnit": "ms", "traceEvents": [\n' + json.dumps(first).encode())
    for path in parts:
        with path.open("rb") as file:
            shutil.copyfileobj(file, out)
    out.write(b"\n]}\n")
