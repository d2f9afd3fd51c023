"""A request to stop, noted between two instructions of Python and acted on by the loop when it suits.

Only while training runs: before it there is nothing to save, so the signals keep what they do by themselves and end
the process even where it waits in native code.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType

from samestep.launcher import environment_numbers
from samestep.launcher.contract import ENV_LAUNCHED

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_USABLE = 0.9  # part of the grace time after which nothing is waited for any more: the rest is for leaving


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and SIGINT are noted; afterwards they do again what they did before.

    A second SIGINT ends the process at once, by the system's own hand, as an impatient person expects; other
    repetitions change nothing, since a launcher and a scheduler often both send one. A signal that is ignored stays
    ignored. Outside the main thread nothing is noted, because Python has no handlers there.
    """

    def __init__(
        self, environ: Mapping[str, str] = os.environ, now: Callable[[], float] = time.monotonic, *, active: bool = True
    ) -> None:
        self.signum = 0  # the first that came
        self.grace = environment_numbers.grace(environ)
        self._alone = ENV_LAUNCHED not in environ and environ.get("RANK", "0") == "0"
        self._now = now
        self._at = 0.0
        self._active = active
        self._interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        """Take over."""
        if self._active and threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def seconds_left(self) -> float | None:
        """Until the state has to be on disk; None while nobody has asked."""
        return max(0.0, self._at + _USABLE * self.grace - self._now()) if self.signum else None

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 (Python's form)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._interrupted:  # it came before the line above had run the first time
                os.kill(os.getpid(), signal.SIGINT)
            self._interrupted = True
        if not self.signum:
            self.signum, self._at = signum, self._now()
            if self._alone:  # os.write: the signal may have come in the middle of a print
                os.write(2, b"samestep: finishing the step and saving (Ctrl-C once more: at once)\n")
