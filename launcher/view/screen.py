"""The display on a terminal: its width, its colours, its signs. rich knows NO_COLOR, COLUMNS and dumb terminals."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console as Screen
from rich.text import Text

from samestep.launcher.view.lines import display
from samestep.launcher.view.standing import Standing


def paint(standing: Standing, stream: TextIO | None = None, *, running: bool = True) -> list[str]:
    """The display as lines with the terminal's colours, for `stream` (stderr if None)."""
    screen = Screen(file=stream, stderr=stream is None, highlight=False, soft_wrap=True)
    plain = not (screen.encoding or "").startswith("utf")
    return [_line(screen, text) for text in display(standing, screen.width - 1, running=running, plain_bar=plain)]


def _line(screen: Screen, text: Text) -> str:
    with screen.capture() as capture:
        screen.print(text, end="")
    return capture.get()


def is_for_people(stream: TextIO) -> bool:
    """Whether lines can be redrawn there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
