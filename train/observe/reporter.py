"""What people and programs see of a run: rank zero writes lines and events.jsonl, the other ranks a null object.

Every method takes values that are already equal on all ranks; nothing here is a collective.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from samestep.launcher.contract import OPTIMIZER, WEIGHTS, RankInfo
from samestep.train.observe.bar import Bar, PlainLines, bar
from samestep.train.observe.evaluation import Evaluation
from samestep.train.observe.event_log import EventLog, finite
from samestep.train.observe.ledger import EpochSums, StepRecords, phase_line


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

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
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

    def already_finished(self, digest: str, steps: int, changed: Sequence[str]) -> None:
        """A finished run was started again, with what changed since; nothing was done."""

    def close(self) -> None:
        """The run is over, however it ended; again where it was finished or preempted."""

    def offset(self) -> int:
        """Bytes of events.jsonl so far: a checkpoint keeps it, a resume cuts there."""
        return 0


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
        """Say where training goes on, or that nothing is left to do."""
        current = epoch + (epoch < self.epochs)
        self._write([{"event": "resumed", "step": step, "epoch": current, "checkpoint": source}])
        self._print(f"Resumed at epoch {current}, step {step}, from {source}")

    def steps(self, records: StepRecords) -> None:
        """Write an event a step, print a line each `log_every` steps of an epoch."""
        lines = self.log.write_steps(records)
        self._tell_of_log()
        self._bar.take(map(json.loads, lines))  # parsed by a view on a terminal alone
        first = records.plans[0].step
        self._of_epoch = [r for r in self._of_epoch if r.plans[0].step < first]  # what a rewind did again counts once
        self._of_epoch.append(records)
        per_epoch = -(-self.samples // self.global_batch_size)
        for row in records.due(self.log_every, self.samples, self.global_batch_size):
            extra = "".join(f", {name}: {shown(value)}" for name, value in records.logged(row).items())
            loss = "none, it has no weight" if records.weightless[row] else shown(records.losses[row])
            self._print(
                f"Epoch [{records.plans[row].epoch + 1}/{self.epochs}], "
                f"Step [{records.position(row, self.samples, self.global_batch_size)}/{per_epoch}], "
                f"Loss: {loss}{extra}"
            )

    def epoch(self, epoch: int, sums: EpochSums) -> None:
        """Print the average and write the event."""
        self._write(
            [
                {
                    "event": "epoch",
                    "epoch": epoch + 1,
                    "loss": finite(sums.loss),
                    "loss_hex": sums.loss.hex(),
                    "samples": sums.samples,
                    "seconds": sums.seconds,
                }
            ]
        )
        self._print(
            f"Epoch [{epoch + 1}/{self.epochs}] finished in {sums.seconds:.2f}s. Average Loss: {shown(sums.loss)}"
        )
        if self._of_epoch:
            first = self._of_epoch[0].plans[0]
            part = f" since step {first.step + 1}" if first.begin else ""
            self._print(f"  time{part}: {phase_line(self._of_epoch)}")
        self._of_epoch.clear()

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        """Print all metrics in one line."""
        metrics = evaluation.metrics
        self._write(
            [
                {
                    "event": "eval",
                    "step": step,
                    "epoch": epoch + 1,
                    "metrics": {name: finite(value) for name, value in metrics.items()},
                    "metrics_hex": {name: value.hex() for name, value in metrics.items()},
                    "samples": evaluation.samples,
                    "seconds": evaluation.seconds,
                    "rank_seconds": evaluation.rank_seconds,
                }
            ]
        )
        text = ", ".join(f"{name}: {shown(value)}" for name, value in metrics.items())
        self._print(f"Evaluation after step {step} on {evaluation.samples} samples: {text}")

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
        self.close()

    def preempted(self, step: int, signal_name: str, checkpoint: int | None) -> None:
        """Write the event, close the bar, say what a next start will find."""
        self._write([{"event": "preempted", "step": step, "signal": signal_name, "checkpoint": checkpoint}])
        found = "no checkpoint is there" if checkpoint is None else f"the checkpoint of step {checkpoint} is kept"
        self._print(f"Stopped by {signal_name} after step {step}: {'saved' if checkpoint == step else found}")
        self.close()

    def already_finished(self, digest: str, steps: int, changed: Sequence[str]) -> None:
        """Print the digest that the run ended with, and what did not go into it."""
        self._print(f"Already finished: {steps} steps, digest {digest}")
        for what in changed:
            ended = "the run had ended before; to train so, pass another --run-dir"
            self._bar.print(f"warning: {what}: {ended}", sys.stderr)

    def close(self) -> None:
        """Close the bar; lines are plain from then on."""
        self._bar.close()
        self._bar = PlainLines()

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


def shown(value: float) -> str:
    """Four decimals, or four digits of what has none of its own there or needs many."""
    plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6
    return f"{value:.4f}" if plain else f"{value:.3e}"
