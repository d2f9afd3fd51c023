"""What people and programs see of a run: rank zero writes lines and events.jsonl, the other ranks a null object.

Every method takes values that are already equal on all ranks; nothing here is a collective.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from samestep.launcher.contract import OPTIMIZER, WEIGHTS, RankInfo
from samestep.train.observe.bar import Bar, PlainLines, bar
from samestep.train.observe.ledger import EpochSums, StepRecords, phase_line
from samestep.train.observe.phases import PHASES

_MOST_WAITING = 100_000  # events, 50 MB; of more, the oldest are given up


class Reporter:
    """Told what happened, in order. This one says nothing: what every rank but zero has."""

    def started(self, generation: int, shards: int, ranks: list[RankInfo], total_steps: int) -> None:
        """All ranks have joined a run of so many steps."""

    def resumed(self, step: int, epoch: int, source: str) -> None:
        """State was loaded after `step` steps."""

    def steps(self, records: StepRecords) -> None:
        """Steps finished since the last call."""

    def epoch(self, epoch: int, sums: EpochSums) -> None:
        """An epoch is complete."""

    def evaluated(self, step: int, epoch: int, metrics: dict[str, float], samples: int, seconds: float) -> None:
        """The evaluation data was gone through."""

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint is committed."""

    def loader(self, workers: int, prefetch: int, text: str) -> None:
        """How batches are fetched, and a sentence about it or nothing."""

    def note(self, text: str) -> None:
        """A sentence that asks for nothing."""

    def warning(self, text: str, **about: str | int) -> None:
        """Something the person should know; training goes on. `about` is for programs."""

    def finished(self, digest: str, steps: int, restarts: int, goodput: float) -> None:
        """Trained to the end; the last call."""

    def preempted(self, step: int, signal_name: str, checkpoint: int | None) -> None:
        """Stopped after `step` because it was asked for; `checkpoint` is the newest committed step. The last call."""

    def already_finished(self, digest: str, steps: int) -> None:
        """A finished run was started again; nothing was done."""

    def offset(self) -> int:
        """Bytes of events.jsonl so far: a checkpoint keeps it, a resume cuts there."""
        return 0


class EventLog:
    """Appends JSON objects to events.jsonl, one a line; a line is written whole or not at all.

    What a full disk does not take waits for the next try; then `problem` says why.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self.clock = clock
        self.problem = ""
        self._waiting: list[str] = []
        self._append([])

    def write(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append events that carry `event`; the time is added here, and what was written is returned."""
        now = self.clock()
        stamped = [{"event": event["event"], "time": now, **event} for event in events]
        self._append([json.dumps(event) + "\n" for event in stamped])
        return stamped

    def write_steps(self, records: StepRecords) -> list[str]:
        """Append a `step` event for each; the lines that were written."""
        lines = step_lines(records, self.clock())
        self._append(lines)
        return lines

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


@dataclass(slots=True)
class RankZeroReporter(Reporter):
    """Lines for people in the form of a hand-written loop, events for programs."""

    log: EventLog
    epochs: int
    samples: int
    global_batch_size: int
    log_every: int
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    _bar: Bar = field(default_factory=PlainLines)
    _of_epoch: list[StepRecords] = field(default_factory=list)
    _told: bool = False

    def started(self, generation: int, shards: int, ranks: list[RankInfo], total_steps: int) -> None:
        """Write who takes part."""
        self._bar = bar(self.stream, total_steps, self.epochs)
        event = "restarted" if generation else "run_started"
        self._write(
            [{"event": event, "generation": generation, "world_size": len(ranks), "shards": shards, "ranks": ranks}]
        )

    def resumed(self, step: int, epoch: int, source: str) -> None:
        """Say where training goes on."""
        self._write([{"event": "resumed", "step": step, "epoch": epoch + 1, "checkpoint": source}])
        self._print(f"Resumed at epoch {epoch + 1}, step {step}, from {source}")

    def steps(self, records: StepRecords) -> None:
        """Write an event a step, print a line each `log_every` steps of an epoch."""
        lines = self.log.write_steps(records)
        self._tell_of_log()
        self._bar.take(map(json.loads, lines))  # parsed by a view on a terminal alone
        self._of_epoch.append(records)
        per_epoch = -(-self.samples // self.global_batch_size)
        for row in records.due(self.log_every, self.global_batch_size):
            extra = "".join(f", {name}: {value:.4f}" for name, value in records.logged(row).items())
            self._print(
                f"Epoch [{records.plans[row].epoch + 1}/{self.epochs}], "
                f"Step [{records.position(row, self.global_batch_size)}/{per_epoch}], "
                f"Loss: {records.losses[row]:.4f}{extra}"
            )

    def epoch(self, epoch: int, sums: EpochSums) -> None:
        """Print the average and write the event."""
        self._write(
            [
                {
                    "event": "epoch",
                    "epoch": epoch + 1,
                    "loss": _finite(sums.loss),
                    "loss_hex": sums.loss.hex(),
                    "samples": sums.samples,
                    "seconds": sums.seconds,
                }
            ]
        )
        self._print(f"Epoch [{epoch + 1}/{self.epochs}] finished in {sums.seconds:.2f}s. Average Loss: {sums.loss:.4f}")
        if self._of_epoch:
            self._print(f"  time: {phase_line(self._of_epoch)}")
        self._of_epoch.clear()

    def evaluated(self, step: int, epoch: int, metrics: dict[str, float], samples: int, seconds: float) -> None:
        """Print all metrics in one line."""
        values = {name: _finite(value) for name, value in metrics.items()}
        hexes = {name: value.hex() for name, value in metrics.items()}
        self._write(
            [
                {
                    "event": "eval",
                    "step": step,
                    "epoch": epoch + 1,
                    "metrics": values,
                    "metrics_hex": hexes,
                    "samples": samples,
                    "seconds": seconds,
                }
            ]
        )
        shown = ", ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        self._print(f"Evaluation after step {step} on {samples} samples: {shown}")

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Write the event."""
        held = {name: (path / name).stat().st_size for name in (WEIGHTS, OPTIMIZER) if (path / name).is_file()}
        self._write([{"event": "checkpoint", "step": step, "path": path.name, "seconds": seconds, "bytes": held}])

    def loader(self, workers: int, prefetch: int, text: str) -> None:
        """Write the event, print the sentence."""
        self._write([{"event": "loader", "workers": workers, "prefetch": prefetch, "reason": text}])
        if text:
            self._print(text)

    def note(self, text: str) -> None:
        """Print it and write the event."""
        self._write([{"event": "note", "text": text}])
        self._print(text)

    def warning(self, text: str, **about: str | int) -> None:
        """Print to stderr and write the event."""
        self._write([{"event": "warning", "text": text, **about}])
        self._bar.print(f"warning: {text}", sys.stderr)

    def finished(self, digest: str, steps: int, restarts: int, goodput: float) -> None:
        """Write the last event, close the bar, print the digest."""
        self._write(
            [{"event": "run_finished", "digest": digest, "steps": steps, "restarts": restarts, "goodput": goodput}]
        )
        self._print(f"Finished Training: {steps} steps, digest {digest}")
        self._bar.close()

    def preempted(self, step: int, signal_name: str, checkpoint: int | None) -> None:
        """Write the event, close the bar, say what a next start will find."""
        self._write([{"event": "preempted", "step": step, "signal": signal_name, "checkpoint": checkpoint}])
        found = "no checkpoint is there" if checkpoint is None else f"the checkpoint of step {checkpoint} is kept"
        self._print(f"Stopped by {signal_name} after step {step}: {'saved' if checkpoint == step else found}")
        self._bar.close()

    def already_finished(self, digest: str, steps: int) -> None:
        """Print the digest that the run ended with."""
        self._print(f"Already finished: {steps} steps, digest {digest}")

    def offset(self) -> int:
        """Bytes of events.jsonl so far."""
        return self.log.offset()

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        self._bar.take(self.log.write(events))
        self._tell_of_log()

    def _tell_of_log(self) -> None:
        """Once, until it can be written again."""
        if self.log.problem and not self._told:
            text = f"{self.log.path} can't be written ({self.log.problem}); training goes on, and events wait in memory"
            self._bar.print(f"warning: {text}", sys.stderr)
        self._told = bool(self.log.problem)

    def _print(self, line: str) -> None:
        self._bar.print(line, self.stream)


_SPREAD = '{"mean": %.7f, "max": %.7f, "slowest_rank": %d}'
_STEP = (
    '{"event": "step", "time": TIME, "step": %d, "epoch": %d, "loss": %s, "loss_hex": "%s", "samples": %d, '
    '"samples_per_s": %.1f, "seconds": {' + ", ".join(f'"{phase}": {_SPREAD}' for phase in PHASES) + "}%s}\n"
)


def step_lines(records: StepRecords, now: float) -> list[str]:
    """The JSON of a `step` event for each; written for every step, so by a template, a tenth of json.dumps's time."""
    template = _STEP.replace("TIME", repr(now))
    spreads = np.stack((records.mean, records.most, records.slowest), 2).reshape(len(records), -1).tolist()
    more = [""] * len(records)
    for row in range(len(records)) if records.extras else ():
        more[row] = ', "extra": ' + json.dumps({name: _finite(value) for name, value in records.logged(row).items()})
    more[-1] += ", " + json.dumps({"rank_seconds": records.loads.seconds, "memory": records.loads.memory})[1:-1]
    lines = []
    for row, (plan, loss) in enumerate(zip(records.plans, records.losses, strict=True)):
        shown = repr(loss) if math.isfinite(loss) else "null"
        place = (plan.step + 1, plan.epoch + 1, shown, loss.hex(), plan.samples, records.samples_per_second(row))
        lines.append(template % (*place, *spreads[row], more[row]))
    return lines


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
