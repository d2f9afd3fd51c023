"""The live view in a notebook: one output of the cell that is replaced while it trains, and stays as it was at the end.

Words are the cell's own prints, in another output, so neither gets between the other's lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

_REDRAW_SECONDS = 0.25  # each one is a message to the browser
_WIDTH = 100  # cells; a cell of a notebook does not tell how wide it is


def is_of_notebook(stream: TextIO | None) -> bool:
    """Whether `stream` ends in a cell, as sys.stdout does in a kernel unless somebody redirects it."""
    return type(stream).__module__ == "ipykernel.iostream"


class NotebookView:
    """The lines of the view as plain text, which every front end shows and every file of a notebook keeps."""

    def __init__(self, total_steps: int, epochs: int) -> None:
        from IPython.display import display as show

        from samestep.launcher.view.standing import Standing

        self._standing = Standing(total=total_steps, epochs=epochs)
        self._output: Any = show(self._text(running=True), raw=True, display_id=True)
        self._drawn = 0.0

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Redraw, if that was not done a moment ago."""
        for event in events:
            self._standing.take(event)
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._output.update(self._text(running=True), raw=True)

    def print(self, line: str, stream: TextIO) -> None:
        """Print the line in the cell."""
        print(line, file=stream, flush=True)

    def close(self) -> None:
        """Leave the last state there."""
        self._output.update(self._text(running=False), raw=True)

    def _text(self, *, running: bool) -> dict[str, str]:
        from samestep.launcher.view.lines import display

        lines = display(self._standing, _WIDTH, running=running, plain_bar=True)
        return {"text/plain": "\n".join(line.plain for line in lines)}
