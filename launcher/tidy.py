"""Who is asked to end by a signal leaves as after an exception: what it started and its temporary folders go first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from samestep.launcher.contract import ExitCode

_ASKED = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ends_tidily() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise SystemExit(143), once; a SIGHUP that is ignored stays so.

    Raises:
        SystemExit: one of them has come.
    """
    previous = {s: signal.getsignal(s) for s in _ASKED if signal.getsignal(s) is not signal.SIG_IGN}

    def leave(_signum: int, _frame: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)  # not in the middle of tidying up
        raise SystemExit(int(ExitCode.TERMINATED))

    for signum in previous:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
