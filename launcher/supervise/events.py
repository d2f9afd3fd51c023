"""Everything that can happen to a running generation, as one stream of events from one place that waits.

Exits come from a pidfd, output from pipes, the operator from a socket, time from the timeout of that same wait. Nothing
here decides anything.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from samestep.launcher.supervise.peers import Halt, Peers
from samestep.launcher.supervise.signals import SignalSocket

Stream = Literal["stdout", "stderr"]
_CHUNK_BYTES = 1 << 16
_PEERS = "peers"  # timer


@dataclass(frozen=True, slots=True)
class Exited:
    """A rank may have ended; its status is still to be collected."""

    rank: int


@dataclass(frozen=True, slots=True)
class Output:
    """A rank wrote `data`; nothing means that the stream is closed."""

    rank: int
    stream: Stream
    data: bytes


@dataclass(frozen=True, slots=True)
class Signalled:
    """The operator sent a signal."""

    signum: int


@dataclass(frozen=True, slots=True)
class Due:
    """A timer ran out."""

    timer: str


@dataclass(frozen=True, slots=True)
class ServerSpoke:
    """The fork server is ready, or has ended."""


Event = Output | Signalled | Exited | Due | ServerSpoke | Halt
_ORDER: dict[type[Event], int] = {Output: 0, Signalled: 1, ServerSpoke: 2, Exited: 3, Halt: 4, Due: 5}


class EventSource:
    """Waits for all of them at once."""

    def __init__(self, signals: SignalSocket, clock: Callable[[], float] = time.monotonic) -> None:
        self._signals = signals
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ, self._read_signals)
        self._timers: dict[str, float] = {}
        self._pidfds: dict[int, int] = {}
        self._peers: Peers | None = None
        self._interval = 0.0
        self._unwatched: set[int] = set()  # ranks whose exit only SIGCHLD tells

    def watch_exit(self, rank: int, pid: int) -> None:
        """Report `Exited(rank)` when the process ends."""
        try:
            pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError):  # not Linux, or a kernel older than 5.3
            self._unwatched.add(rank)
            return
        self._pidfds[rank] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: [Exited(rank)])

    def forget_exit(self, rank: int) -> None:
        """The rank's status has been collected."""
        self._unwatched.discard(rank)
        pidfd = self._pidfds.pop(rank, None)
        if pidfd is not None:
            self._selector.unregister(pidfd)
            os.close(pidfd)

    def watch_output(self, rank: int, stream: Stream, fd: int) -> None:
        """Report what comes through a non-blocking pipe."""
        self._selector.register(fd, selectors.EVENT_READ, lambda: [Output(rank, stream, os.read(fd, _CHUNK_BYTES))])

    def watch_server(self, fd: int) -> None:
        """Report `ServerSpoke` while there is something to read."""
        self._selector.register(fd, selectors.EVENT_READ, lambda: [ServerSpoke()])

    def watch_peers(self, peers: Peers, interval: float) -> None:
        """Report what `peers` make of what other machines say; every `interval` seconds they may say something too."""
        self._selector.register(peers, selectors.EVENT_READ, lambda: list(peers.read()))
        self._peers, self._interval = peers, interval
        self.start_timer(_PEERS, interval)

    def forget(self, fd: int) -> None:
        """Stop reading what the caller is about to close."""
        self._selector.unregister(fd)

    def start_timer(self, name: str, seconds: float) -> None:
        """Report `Due(name)` once, `seconds` from now; replaces a timer of that name."""
        self._timers[name] = self._clock() + seconds

    def stop_timer(self, name: str) -> None:
        """Forget a timer, running or not."""
        self._timers.pop(name, None)

    def wait(self) -> list[Event]:
        """Block until something happens; output comes first, so that what a rank said last is known when it ends."""
        found: list[Event] = []
        for key, _ in self._selector.select(self._timeout()):
            found += key.data()
        now = self._clock()
        for name in [name for name, at in self._timers.items() if at <= now]:
            del self._timers[name]
            if name == _PEERS and self._peers is not None:
                found += self._peers.read()
                self.start_timer(_PEERS, self._interval)
            else:
                found.append(Due(name))
        return sorted(found, key=lambda event: _ORDER[type(event)])

    def close(self) -> None:
        """Release every descriptor that was opened here."""
        for rank in list(self._pidfds):
            self.forget_exit(rank)
        self._selector.close()

    def _timeout(self) -> float | None:
        return max(0.0, min(self._timers.values()) - self._clock()) if self._timers else None

    def _read_signals(self) -> list[Event]:
        found: list[Event] = []
        for signum in self._signals.read():
            if signum != signal.SIGCHLD:
                found.append(Signalled(signum))
            else:
                found += [Exited(rank) for rank in sorted(self._unwatched)]
        return found
