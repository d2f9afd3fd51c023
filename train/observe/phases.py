"""Where the time of a step goes: seconds a phase on this rank, always on.

A clock is told which phase begins, tells it on (see launcher/heartbeat.py) and adds the time up. On a GPU the host only
launches work, so there CUDA events are recorded and read when they are long done; the host never waits for them inside
a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

PHASES = ("data", "forward", "backward", "sync", "optimizer")


Reading = Callable[[], list[float]]


def _nobody(phase: str) -> None:
    """Nobody wants to know at once."""


class PhaseClock(Protocol):
    """Tells apart the phases of a step."""

    current: str

    def enter(self, phase: str) -> None:
        """End the running phase and begin `phase`."""

    def take(self) -> Reading:
        """Close a step; the reading gives its seconds of PHASES, and may wait for the device when it is read."""


@dataclass(slots=True)
class HostClock:
    """Times phases by `now`, in seconds."""

    now: Callable[[], float]
    tell: Callable[[str], None] = _nobody
    current: str = "optimizer"
    _since: float = 0.0
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def __post_init__(self) -> None:
        self._since = self.now()

    def enter(self, phase: str) -> None:
        """Attribute the time since the last call to the phase that ends."""
        moment = self.now()
        self._seconds[self.current] += moment - self._since
        self.current, self._since = phase, moment
        self.tell(phase)

    def take(self) -> Reading:
        """Seconds by phase; starts again at zero."""
        self.enter(self.current)
        seconds = list(self._seconds.values())
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return lambda: seconds


@dataclass(slots=True)
class CudaClock:
    """Times phases by events on the current CUDA stream; data loading, which is host work, by `now`."""

    now: Callable[[], float]
    tell: Callable[[str], None] = _nobody
    current: str = "optimizer"
    _host: HostClock = field(init=False)
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._host = HostClock(self.now, self.tell)
        self._mark(self.current)

    def enter(self, phase: str) -> None:
        """Record an event; nothing waits for it."""
        self._host.enter(phase)
        self._mark(phase)

    def take(self) -> Reading:
        """Events of the step that ends; read them where losses are read anyway."""
        data_seconds = self._host.take()()[0]
        self._mark(self.current)
        marks, self._marks = self._marks, self._marks[-1:]
        return lambda: _elapsed(marks, data_seconds)

    def _mark(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))
        self.current = phase


def _elapsed(marks: list[tuple[str, Any]], data_seconds: float) -> list[float]:
    marks[-1][1].synchronize()
    seconds = dict.fromkeys(PHASES, 0.0)
    for (phase, begin), (_, end) in itertools.pairwise(marks):
        seconds[phase] += begin.elapsed_time(end) / 1000
    seconds["data"] = data_seconds
    return list(seconds.values())
