"""Curves in other people's tools: accelerate's trackers behind the reporter, on rank zero.

One point for each line that is printed, with the step as x. A run that goes on continues its curves: what has been sent
is noted in `trackers.json` before it is sent, and steps that are done again are not sent again. A tracker is called
between steps and never beside them, since it may draw from the global random numbers; when it fails, training goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import tracking

from samestep.launcher.command_line.options import nearest_hint
from samestep.launcher.contract import RankInfo, UsageError
from samestep.train.observe.evaluation import Evaluation
from samestep.train.observe.ledger import EpochSums, StepRecords
from samestep.train.observe.mlflow_names import legal
from samestep.train.observe.reporter import Reporter

PROJECT = "samestep"  # where the tool does not read another name from its own environment variable
EXTRAS = ("mlflow", "tensorboard", "wandb")
GIVEN_UP_AFTER = 3  # failures in a row


def wanted(text: str) -> list[str]:
    """Names in `--trackers`, each once.

    Raises:
        UsageError: accelerate knows no such tracker, or its package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    available = {str(kind) for kind in tracking.get_available_trackers()}
    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
            hint = nearest_hint(name, set(tracking.LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"--trackers is expected to name some of {known}, but names {name}", hint)
        if name not in available:
            package = f"'samestep[{name}]'" if name in EXTRAS else name
            raise UsageError(
                f"--trackers {name} is expected to find the package of that name, but it is not installed",
                f"pip install {package}",
            )
    return names


@dataclass(slots=True)
class Sent:
    """What each tracker has got, in RUN_DIR/trackers.json: its own run's id, and the last step of each curve."""

    path: Path
    content: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(self.path.read_text())
            self.content = stored if isinstance(stored, dict) else {}

    def of(self, name: str) -> dict[str, Any]:
        """The entry of one tracker."""
        return self.content.setdefault(name, {"id": None, "steps": {}})

    def save(self) -> None:
        """Replace the file as a whole."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.rename(self.path)


_MLFLOW_FILES = "/trackers/mlruns"  # of a run directory


@dataclass(slots=True)
class Feed:
    """One tracker: started late, fed each point once, given up after failures in a row."""

    name: str
    run_dir: Path
    sent: Sent
    warn: Callable[[str], None]
    tracker: Any = None
    failures: int = 0
    names: dict[str, str] = field(default_factory=dict)  # of metrics as the tool has them, by ours

    def start(self, config: dict[str, Any]) -> None:
        """Open the tool's run, or go on with the one of an earlier start."""
        entry = self.sent.of(self.name)
        new = not entry["steps"] and entry["id"] is None
        self.tracker = self._safely(lambda: _started(self.name, self.run_dir, entry["id"]))
        if self.tracker is None:
            return
        entry["id"] = self._safely(lambda: _id_of(self.name, self.tracker))
        self._safely(self.sent.save)
        if new:
            self._safely(lambda: _describe(self.name, self.tracker, config))

    def log(self, curve: str, step: int, values: dict[str, float]) -> None:
        """Send one point of `curve` unless it was sent before."""
        steps = self.sent.of(self.name)["steps"]
        if self.tracker is None or step <= steps.get(curve, 0):
            return
        steps[curve] = step

        def send() -> None:
            self.sent.save()
            self.tracker.log({self._its(name): value for name, value in values.items()}, step=step)

        self._safely(send)

    def finish(self, *, failed: bool = False) -> None:
        """Close the tool's run, once."""
        if self.tracker is not None:
            self._safely(lambda: _end(self.name, self.tracker, failed=failed))
        self.tracker = None

    def _its(self, name: str) -> str:
        if self.name == "mlflow" and name not in self.names:
            self.names[name] = legal(name, self.names.values())
            if self.names[name] != name:
                self.warn(f"tracker mlflow takes no metric of the name {name}: there it is {self.names[name]}")
        return self.names.get(name, name)

    def _safely(self, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 (whatever a tracker raises, it never stops training)
            self.failures += 1
            last = self.failures >= GIVEN_UP_AFTER or self.tracker is None
            if last:
                self.tracker = None
            if last or self.failures == 1:
                end = "it gets no more points" if last else "training goes on"
                self.warn(
                    f"tracker {self.name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {end}"
                )
            return None
        self.failures = 0
        return result


def _keep_mlflow_below(run_dir: Path) -> None:
    """Where nobody has named a store: files. The default of mlflow is a database, which mlflow-skinny has not."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if named and not named.endswith(_MLFLOW_FILES):  # else that of an earlier call in this process
        return
    os.environ["MLFLOW_TRACKING_URI"] = run_dir.absolute().as_uri() + _MLFLOW_FILES
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def _started(name: str, run_dir: Path, known: str | None) -> Any:
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    if name == "mlflow":
        _keep_mlflow_below(run_dir)
        tracker = kind(experiment_name=PROJECT, run_id=known, run_name=run_dir.name)
    elif name == "wandb":
        resume = {"id": known, "resume": "allow"} if known else {}
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        tracker = kind(project, name=run_dir.name, dir=str(run_dir), **resume)
    elif kind.requires_logging_directory:
        tracker = kind(name, logging_dir=str(run_dir / "trackers"))
    else:
        tracker = kind(run_dir.name)
    tracker.start()
    return tracker


def _id_of(name: str, tracker: Any) -> str | None:
    """What the tool needs to go on with the same run; None where a folder or a name is enough."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.id) if name == "wandb" else None


def _describe(name: str, tracker: Any, config: dict[str, Any]) -> None:
    """The options, once. TensorBoard's own form of them would show up as a second run, so there they are a text."""
    if name == "tensorboard":
        tracker.log({"configuration": f"```\n{json.dumps(config, indent=1)}\n```"}, step=0)
    else:
        tracker.store_init_configuration(config)


def _end(name: str, tracker: Any, *, failed: bool) -> None:
    """As finished, or where the tool knows of it as failed, which accelerate has no word for."""
    if failed and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    else:
        tracker.finish()


@dataclass(slots=True)
class TrackedReporter(Reporter):
    """A reporter whose points also go to trackers."""

    inner: Reporter
    feeds: list[Feed]
    config: dict[str, Any]
    samples: int
    global_batch_size: int
    log_every: int
    _step: int = 0  # of the last records

    def started(self, generation: int, shards: int, ranks: list[RankInfo], total_steps: int) -> None:
        """Start the trackers too."""
        self.inner.started(generation, shards, ranks, total_steps)
        for feed in self.feeds:
            feed.start(self.config | {"shards": shards})

    def steps(self, records: StepRecords) -> None:
        """Send the steps for which a line is printed."""
        self.inner.steps(records)
        self._step = records.plans[-1].step + 1
        for row in records.due(self.log_every, self.samples, self.global_batch_size):
            plan, speed = records.plans[row], records.samples_per_second(row)
            values = {"loss": records.losses[row], "samples_per_s": speed, "epoch": plan.epoch + 1.0}
            self._send("train", plan.step + 1, values | records.logged(row))

    def epoch(self, epoch: int, sums: EpochSums) -> None:
        """Send the average, at the last step of the epoch."""
        self.inner.epoch(epoch, sums)
        self._send("epoch", self._step, {"loss": sums.loss, "seconds": sums.seconds})

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        """Send all metrics."""
        self.inner.evaluated(step, epoch, evaluation)
        self._send("eval", step, evaluation.metrics)

    def finished(self, digest: str, steps: int, restarts: int, goodput: float) -> None:
        """Close the trackers."""
        for feed in self.feeds:
            feed.finish()
        self.inner.finished(digest, steps, restarts, goodput)

    def resumed(self, step: int, epoch: int, source: str) -> None:
        """Nothing for a tracker."""
        self.inner.resumed(step, epoch, source)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Nothing for a tracker."""
        self.inner.checkpoint(step, path, seconds)

    def loader(self, workers: int, prefetch: int, text: str) -> None:
        """Nothing for a tracker."""
        self.inner.loader(workers, prefetch, text)

    def warning(self, text: str, **about: str | int) -> None:
        """Nothing for a tracker."""
        self.inner.warning(text, **about)

    def note(self, text: str) -> None:
        """Nothing for a tracker."""
        self.inner.note(text)

    def already_finished(self, digest: str, steps: int, changed: Sequence[str]) -> None:
        """Nothing for a tracker."""
        self.inner.already_finished(digest, steps, changed)

    def preempted(self, step: int, signal_name: str, checkpoint: int | None) -> None:
        """Close the trackers."""
        for feed in self.feeds:
            feed.finish()
        self.inner.preempted(step, signal_name, checkpoint)

    def close(self) -> None:
        """Close trackers that are still fed: the run has failed."""
        for feed in self.feeds:
            feed.finish(failed=True)
        self.inner.close()

    def offset(self) -> int:
        """As without trackers."""
        return self.inner.offset()

    def _send(self, curve: str, step: int, values: dict[str, float]) -> None:
        for feed in self.feeds:
            feed.log(curve, step, {f"{curve}/{name}": value for name, value in values.items()})


def tracked(
    inner: Reporter, names: list[str], run_dir: Path, config: dict[str, Any], rhythm: tuple[int, int, int]
) -> Reporter:
    """`inner` itself without trackers; `rhythm`: samples of an epoch and of a step, steps between lines."""
    if not names:
        return inner
    sent = Sent(run_dir / "trackers.json")
    feeds = [Feed(name, run_dir.absolute(), sent, inner.warning) for name in names]
    return TrackedReporter(inner, feeds, config, *rhythm)
