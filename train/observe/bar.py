"""The live view of a rank that people started by hand, and where nobody can watch, plain lines.

It is the view of `samestep run` and `samestep watch`, drawn from the same events. Below `samestep run` ranks write into
a pipe, so there the launcher draws.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO

from samestep.launcher.contract import ENV_PDB
from samestep.train.observe.notebook import NotebookView, is_of_notebook

_REDRAW_SECONDS = 0.1


class Bar(Protocol):
    """Where a rank's words go."""

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Events that were written."""

    def print(self, line: str, stream: TextIO) -> None:
        """A line of words."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainLines:
    """What a file and a pipe get."""

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Nothing to draw."""

    def print(self, line: str, stream: TextIO) -> None:
        """Print the line; that nobody reads any more, as after `| head`, ends no training: the events have it all."""
        try:
            print(_printable(line, stream), file=stream, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also for what the recipe prints itself
        except OSError:
            pass  # a file on a full disk

    def close(self) -> None:
        """Nothing to close."""


def _printable(line: str, stream: TextIO) -> str:
    """The line, with escapes for what the stream's encoding lacks, as of a terminal that was told LC_ALL=C."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a recipe may have put its own object there
    return line.encode(encoding, "backslashreplace").decode(encoding)


class LiveView:
    """A few lines that are redrawn, with words printed above them."""

    def __init__(self, stream: TextIO, total_steps: int, epochs: int) -> None:
        from rich.console import Console
        from rich.live import Live

        from samestep.launcher.view.standing import Standing

        self._standing = Standing(total=total_steps, epochs=epochs)
        self._live = Live(console=Console(file=stream), transient=True, auto_refresh=False)
        self._live.start()
        self._drawn = 0.0

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Redraw, if that was not done a moment ago."""
        for event in events:
            self._standing.take(event)
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._draw()

    def print(self, line: str, stream: TextIO) -> None:  # noqa: ARG002 (the view owns the terminal)
        """Print above the view."""
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the view."""
        self._live.stop()

    def _draw(self) -> None:
        from rich.console import Group

        from samestep.launcher.view.lines import display

        lines = display(self._standing, self._live.console.width)
        self._live.update(Group(*lines), refresh=True)


def bar(stream: TextIO | None, total_steps: int, epochs: int) -> Bar:
    """The view on a terminal or in a notebook, else plain lines, also where a debugger needs the terminal."""
    if is_of_notebook(stream):
        return NotebookView(total_steps, epochs)
    if stream is None or not getattr(stream, "isatty", bool)() or ENV_PDB in os.environ:  # None: nobody has any
        return PlainLines()
    return LiveView(stream, total_steps, epochs)
