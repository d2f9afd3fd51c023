"""Where the time of a step goes: seconds a phase on this rank, always on.

A clock is told which phase begins, tells it on (see launcher/heartbeat.py) and adds the time up. On a GPU the host only
launches work, so there CUDA events are recorded and read when they are long done; the host never waits for them inside
a step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

PHASES = ("data", "forward", "backward", "sync", "optimizer")
BETWEEN = "between"  # what the loop does from the end of one step to the begin of the next
AT_ONCE = 50e-6  # seconds on the host: a step that begins so soon after the one before needs no event of its own
WAITING = "sync"  # the phase in which a rank waits for others: it is longest on the fastest one
Reading = Callable[[], list[float]]


def _nobody(phase: str) -> None:
    """Nobody wants to know at once."""


class PhaseClock(Protocol):
    """Tells apart the phases of a step."""

    current: str

    def enter(self, phase: str) -> None:
        """End the running phase and begin `phase`."""

    def take(self) -> Reading:
        """Close a step; the reading gives its seconds of PHASES and BETWEEN, and may wait for the device.

        BETWEEN is the time before the step.
        """

    def skip(self) -> None:
        """Between two steps: the time since the last one was for something that is reported by itself."""

    def behind(self) -> tuple[int, str] | None:
        """Steps that the device is behind the host and its phase, None where nothing is left to do; on any thread."""


@dataclass(slots=True)
class HostClock:
    """Times phases by `now`, in seconds."""

    now: Callable[[], float]
    tell: Callable[[str], None] = _nobody
    current: str = "optimizer"
    _counted: str = BETWEEN
    _since: float = 0.0
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, BETWEEN), 0.0))

    def __post_init__(self) -> None:
        self._since = self.now()

    def enter(self, phase: str) -> None:
        """Attribute the time since the last call to the phase that ends."""
        moment = self.now()
        self._seconds[self._counted] += moment - self._since
        self.current, self._counted, self._since = phase, phase, moment
        self.tell(phase)

    def take(self) -> Reading:
        """Seconds by phase; starts again at zero."""
        moment = self.now()
        self._seconds[self._counted] += moment - self._since
        self._counted, self._since = BETWEEN, moment
        seconds = list(self._seconds.values())
        self._seconds = dict.fromkeys((*PHASES, BETWEEN), 0.0)
        return lambda: seconds

    def skip(self) -> None:
        """Count from here on."""
        self._since = self.now()

    def behind(self) -> None:
        """The host is what computes."""


@dataclass(slots=True)
class CudaClock:
    """Times phases by events on the stream that is current when it is made.

    A phase begins on the device when all before it is done there, so data are what the device had to wait for, and
    nothing of a batch that came while it worked. Making an event costs as much as recording one: they are used again.
    """

    tell: Callable[[str], None] = _nobody
    current: str = "optimizer"
    now: Callable[[], float] = time.perf_counter
    _taken: float = -math.inf  # when the last step was closed
    _stream: torch.cuda.Stream = field(default_factory=torch.cuda.current_stream)
    _marks: list[tuple[str, Any]] = field(default_factory=list)
    _read: list[Any] = field(default_factory=list)
    _unread: deque[tuple[str, Any]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._mark(BETWEEN)

    def enter(self, phase: str) -> None:
        """Record an event; nothing waits for it."""
        self.current = phase
        if self._marks[-1][0] == BETWEEN and self.now() - self._taken < AT_ONCE:
            self._share(phase)
        else:
            self._mark(phase)
        self.tell(phase)

    def take(self) -> Reading:
        """Events of the step that ends; read them where losses are read anyway."""
        self._mark(BETWEEN)
        marks, self._marks = self._marks, self._marks[-1:]
        self._taken = self.now()
        return lambda: self._elapsed(marks)

    def skip(self) -> None:
        """Count from here on."""
        self._taken = -math.inf
        self._marks.clear()
        self._mark(BETWEEN)

    def behind(self) -> tuple[int, str] | None:
        """See PhaseClock: the device is in the phase before the first event that it has not come to."""
        marks = list(self._unread)
        ahead = next((number for number, (_, event) in enumerate(marks) if not event.query()), None)
        if ahead is None:
            return None
        # what it does between two steps counts to the second one, as for the host
        phases = [name for name, _ in marks[max(0, ahead - 1) :] if name != BETWEEN]
        steps = sum(name == BETWEEN for name, _ in marks[ahead:])
        return (steps - (marks[-1][0] == BETWEEN), phases[0]) if phases else None

    def _mark(self, phase: str) -> None:
        event: Any = self._read.pop() if self._read else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append((phase, event))
        self._unread.append((phase, event))

    def _share(self, phase: str) -> None:
        """Begin a phase with the event that closed the step before."""
        ((_, event),) = self._marks
        self._marks = [(phase, event)]
        self._unread.append((phase, event))

    def _elapsed(self, marks: list[tuple[str, Any]]) -> list[float]:
        marks[-1][1].synchronize()
        seconds = dict.fromkeys((*PHASES, BETWEEN), 0.0)
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            seconds[phase] += begin.elapsed_time(end) / 1000
            self._read.append(begin)  # the last one is the next step's first
        while self._unread[0][1] is not marks[-1][1]:
            self._unread.popleft()
        return list(seconds.values())
