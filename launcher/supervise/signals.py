"""The operator's signals become bytes on a socket, so that the event loop decides and no handler does."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

OPERATOR = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """The interpreter writes the byte; a handler must exist for it to do so."""


class SignalSocket:
    """While entered, signals wake `fileno()` instead of interrupting; what was set before is restored on leaving."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous: dict[int, object] = {}
        self._previous_fd = -1

    def __enter__(self) -> SignalSocket:
        """Take over."""
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in (*OPERATOR, signal.SIGCHLD):
            # nohup ignores SIGHUP so that the run outlives the terminal: leave that as it is
            if not (signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN):
                self._previous[signum] = signal.signal(signum, _ignore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._reader.fileno()

    def read(self) -> list[int]:
        """Numbers of the signals since the last call, in order."""
        return self._receive()

    def asked(self) -> bool:
        """Whether one of the operator's is still to be read."""
        return any(signum != signal.SIGCHLD for signum in self._receive(socket.MSG_PEEK))

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """While entered, the operator's next one raises KeyboardInterrupt, which ends this block and no more."""

        def interrupt(_signum: int, _frame: FrameType | None) -> None:
            self._handle(_ignore)
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            try:
                self._handle(interrupt)
                yield
            finally:
                self._handle(_ignore)

    def _receive(self, flags: int = 0) -> list[int]:
        try:
            return list(self._reader.recv(4096, flags))
        except BlockingIOError:
            return []

    def _handle(self, handler: Callable[[int, FrameType | None], None]) -> None:
        for signum in OPERATOR:
            if signum in self._previous:
                signal.signal(signum, handler)


def hear_none() -> None:
    """From now on the operator's signals change nothing: all is done, and one would only replace the exit code."""
    for signum in OPERATOR:
        signal.signal(signum, signal.SIG_IGN)
