"""How far a run has come: one line that is redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TextIO


class NoBar:
    """Plain lines: what a log file gets."""

    def advance_to(self, step: int, loss: float) -> None:
        """Nothing to draw."""

    def print(self, line: str, stream: TextIO) -> None:
        """Print the line."""
        print(line, file=stream, flush=True)

    def close(self) -> None:
        """Nothing to close."""


class RichBar:
    """One line that is redrawn, with lines printed above it."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task("steps", total=total_steps, loss=float("nan"))
        self._progress.start()

    def advance_to(self, step: int, loss: float) -> None:
        """Redraw."""
        self._progress.update(self._task, completed=step, loss=loss)

    def print(self, line: str, stream: TextIO) -> None:  # noqa: ARG002 (the bar owns the terminal)
        """Print above the bar."""
        self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


def progress_bar(stream: TextIO, total_steps: int) -> NoBar | RichBar:
    """The bar for a terminal, plain lines for anything else."""
    return RichBar(stream, total_steps) if stream.isatty() else NoBar()
