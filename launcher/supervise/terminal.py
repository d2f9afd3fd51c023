"""The terminal's settings, which a rank that was killed at pdb's prompt can't put back."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator


@contextlib.contextmanager
def kept(*, lent: bool) -> Iterator[None]:
    """Leave stdin's terminal as it was, if it is one and was lent to a rank."""
    try:
        before = termios.tcgetattr(sys.stdin) if lent else None
    except (termios.error, OSError, ValueError):  # a pipe, or closed
        before = None
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError, ValueError):
            # not without need: a process in the background is stopped for it
            if before is not None and termios.tcgetattr(sys.stdin) != before:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
