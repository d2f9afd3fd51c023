"""events.jsonl as rank zero writes it: whole lines or none, with the time of each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from samestep.train.observe.ledger import StepRecords
from samestep.train.observe.phases import PHASES

_MOST_WAITING = 100_000  # events, 50 MB; of more, the oldest are given up


class EventLog:
    """Appends JSON objects to events.jsonl, one a line; a line is written whole or not at all.

    What a full disk does not take waits for the next try; then `problem` says why.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self.clock = clock
        self.problem = ""
        self._waiting: list[str] = []
        self._stepped = clock()  # time of the newest step, at first of our own start
        self._append([])

    def write(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append events that carry `event`; the time is added here, and what was written is returned."""
        now = self.clock()
        stamped = [{"event": event["event"], "time": now, **event} for event in events]
        self._append([json.dumps(event) + "\n" for event in stamped])
        return stamped

    def write_steps(self, records: StepRecords) -> list[str]:
        """Append a `step` event for each, whose time is that of its end; the lines that were written."""
        lines = step_lines(records, self._done_at(records.walls))
        self._append(lines)
        return lines

    def _done_at(self, walls: list[float]) -> list[float]:
        """When each of these steps was done: the last one now, none before those that were written earlier."""
        now, before = self.clock(), self._stepped
        self._stepped = now
        left = np.cumsum([0.0, *reversed(walls[1:])])[::-1]
        times: list[float] = np.maximum(now - left, min(before, now)).tolist()
        return times

    def _append(self, lines: list[str]) -> None:
        self._waiting = [*self._waiting, *lines][-_MOST_WAITING:]
        try:
            with self.path.open("ab", buffering=0) as file:  # anew each time: going back cuts the file
                _write_whole(file, "".join(self._waiting).encode())
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self.problem, self._waiting = "", []

    def offset(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0


def _write_whole(file: FileIO, content: bytes) -> None:
    size, rest = file.seek(0, os.SEEK_END), memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(size)
        raise


_SPREAD = '{"mean": %.7f, "max": %.7f, "slowest_rank": %d}'
_STEP = (
    '{"event": "step", "time": %r, "step": %d, "epoch": %d, "loss": %s, "loss_hex": "%s", "samples": %d, '
    '"samples_per_s": %.7g, "seconds": {' + ", ".join(f'"{phase}": {_SPREAD}' for phase in PHASES) + "}%s}\n"
)


def step_lines(records: StepRecords, times: list[float]) -> list[str]:
    """The JSON of a `step` event for each, done at `times`: by a template, in a tenth of json.dumps's time."""
    spreads = np.stack((records.mean, records.most, records.slowest), 2).reshape(len(records), -1).tolist()
    more = [""] * len(records)
    for row in range(len(records)) if records.extras else ():
        more[row] = ', "extra": ' + json.dumps({name: finite(value) for name, value in records.logged(row).items()})
    more[-1] += ", " + json.dumps({"rank_seconds": records.loads.seconds, "memory": records.loads.memory})[1:-1]
    lines = []
    for row, (plan, loss) in enumerate(zip(records.plans, records.losses, strict=True)):
        shown = repr(loss) if math.isfinite(loss) else "null"
        place = (times[row], plan.step + 1, plan.epoch + 1, shown, loss.hex(), plan.samples)
        weight = ', "weightless": true' if records.weightless[row] else ""
        lines.append(_STEP % (*place, records.samples_per_second(row), *spreads[row], weight + more[row]))
    return lines


def finite(value: float) -> float | None:
    """What JSON can say: None for NaN and infinity."""
    return value if math.isfinite(value) else None
