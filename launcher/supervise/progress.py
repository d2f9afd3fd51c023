"""One progress line for people who watch, read from the run's own events.jsonl. Draws nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samestep.launcher.contract import RunDir

if TYPE_CHECKING:
    from rich.progress import Progress

REFRESH_SECONDS = 0.5


class ProgressLine:
    """Follows the steps of a run; scripts that write no events never get a line."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._offset = _size(run_dir)  # a resumed run appends: what is there already is history
        self._partial = b""
        self._step: Mapping[str, Any] = {}
        self._total: int | None = None
        self._bar: Progress | None = None

    def update(self) -> str | None:
        """The line to show, None if there is nothing to say yet or no more."""
        for event in self._new_events():
            if event.get("event") == "step":
                self._step = event
            elif event.get("event") == "run_finished":
                self._step = {}
        return self._render() if self._step else None

    def _new_events(self) -> list[dict[str, Any]]:
        try:
            with self._run_dir.events.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [event for event in map(_parse, lines) if event]

    def _total_steps(self) -> int | None:
        if self._total is None:
            try:
                total = json.loads(self._run_dir.config.read_bytes()).get("total_steps")
                self._total = total if isinstance(total, int) else None
            except (OSError, ValueError, AttributeError):
                return None
        return self._total

    def _render(self) -> str:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        screen = Console(stderr=True)
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=screen, auto_refresh=False)
            self._bar.add_task("", facts="")
        step = self._step
        loss, speed = step.get("loss"), step.get("samples_per_s")
        facts = [
            f"step {step.get('step')}" + (f"/{self._total}" if self._total_steps() else ""),
            f"epoch {step.get('epoch')}",
            f"loss {loss:.4g}" if isinstance(loss, int | float) else "",
            f"{speed:.0f} samples/s" if isinstance(speed, int | float) else "",
        ]
        task = self._bar.task_ids[0]
        self._bar.update(
            task, completed=int(step.get("step") or 0), total=self._total, facts="  ".join(filter(None, facts))
        )
        with screen.capture() as capture:
            screen.print(self._bar.get_renderable(), end="", no_wrap=True, overflow="crop")
        return capture.get().rstrip("\n")


def _size(run_dir: RunDir) -> int:
    try:
        return run_dir.events.stat().st_size
    except OSError:
        return 0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
