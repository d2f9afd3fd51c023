"""A run directory as numbers: one pass over events.jsonl, in memory that does not grow with the length of the run."""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.heartbeat import where
from samestep.launcher.report.thinning import Position, Thinner

PHASES = ("data", "forward", "backward", "sync", "optimizer")
BETWEEN = "between"  # steps: reports, checks, and what a loop does
EVALUATION, CHECKPOINT = BESIDE = "evaluation", "checkpoint"
# What a row of `History.steps` holds. The rate of a bucket is samples over seconds, never a mean of rates.
STEP_COLUMNS = ("loss", "rate", "samples", "seconds", *(f"{p} mean" for p in PHASES), *(f"{p} max" for p in PHASES))
MOST_MOMENTS = 400  # first half and last half of more are kept
_LEVELS = 400  # buckets of series that have a point a log interval or less


class Moment(NamedTuple):
    """Something that happened once; `kind` is the event's name."""

    kind: str
    at: Position
    text: str


@dataclass(slots=True)
class RankSums:
    """What ranks did since the number of ranks last changed."""

    world_size: int = 0
    since_step: int = 0
    steps: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # phase -> sums by rank
    slowest: Counter[tuple[str, int]] = field(default_factory=Counter)  # (phase, rank) -> steps


@dataclass(slots=True)
class History:
    """Everything that a page shows of one run."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: Thinner = field(default_factory=Thinner)
    losses: array[float] = field(default_factory=lambda: array("d"))  # of every step, exact: to compare bits
    loss_steps: array[int] = field(default_factory=lambda: array("q"))  # which steps these are
    series: dict[tuple[str, str], Thinner] = field(default_factory=dict)  # ("extra" | "eval" | kind of memory, name)
    moments: list[Moment] = field(default_factory=list)
    evaluated: dict[str, float | None] = field(default_factory=dict)  # the last value of each metric
    checkpoints: list[tuple[Position, int]] = field(default_factory=list)  # when it was committed, and of which step
    ranks: RankSums = field(default_factory=RankSums)
    generations: list[Mapping[str, Any]] = field(default_factory=list)
    finished: Mapping[str, Any] | None = None
    broken: list[Position] = field(default_factory=list)  # steps whose loss was not finite, the first MOST_MOMENTS
    unreadable: int = 0  # lines that are no event
    dropped: int = 0  # moments that were too many
    last: Position = field(default=Position(0, 0, 0.0))
    _begin: float | None = None
    _loaded: int = 0  # steps since times of ranks were told

    @property
    def status(self) -> str:
        """`finished`, `failed`, or `not finished`: stopped, or still at it."""
        if self.finished is not None:
            return "finished"
        ends = [moment.kind for moment in self.moments if moment.kind in _STARTS or moment.kind == "worker_failed"]
        return "failed" if ends and ends[-1] == "worker_failed" else "not finished"

    @property
    def restarts(self) -> int:
        """Starts after the first one, also of ranks that failed before they could write that they had started."""
        return max([0, len(self.generations) - 1, *(int(start.get("generation", 0)) for start in self.generations)])

    def take(self, event: Mapping[str, Any]) -> None:
        """One event, in the order of the file; unknown ones are passed over.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not what its name says.
        """
        self._begin = float(event["time"]) if self._begin is None else self._begin
        seconds = max(float(event["time"]) - self._begin, self.last.seconds)
        handle = _HANDLERS.get(str(event["event"]))
        if handle is not None:
            handle(self, event, seconds)

    def _place(self, seconds: float, step: int | None = None) -> Position:
        return Position(self.last.step if step is None else step, self.last.samples, seconds)

    def _note(self, kind: str, at: Position, text: str) -> None:
        self.moments.append(Moment(kind, at, text))
        if len(self.moments) > MOST_MOMENTS:
            del self.moments[MOST_MOMENTS // 2]
            self.dropped += 1

    def _step(self, event: Mapping[str, Any], seconds: float) -> None:
        spreads, samples, rate = event["seconds"], int(event["samples"]), float(event["samples_per_s"])
        step, loss, exact = int(event["step"]), _number(event["loss"]), float.fromhex(event["loss_hex"])
        means = [float(spreads[phase]["mean"]) for phase in PHASES]
        highest = [float(spreads[phase]["max"]) for phase in PHASES]
        extra = {name: _number(value) for name, value in event.get("extra", {}).items()}
        at = self.last = Position(step, self.last.samples + samples, seconds)
        self.steps.add(at, (loss, rate or None, samples, samples / rate if rate else None, *means, *highest))
        self.losses.append(exact)
        self.loss_steps.append(step)
        if loss is None and not event.get("weightless") and len(self.broken) < MOST_MOMENTS:
            self.broken.append(at)
        for name, value in extra.items():
            self._add("extra", name, at, value)
        self._loaded += 1
        self.ranks.slowest.update((phase, int(spreads[phase]["slowest_rank"])) for phase in PHASES)
        if "rank_seconds" in event:
            self._loads(event, at)

    def _loads(self, event: Mapping[str, Any], at: Position) -> None:
        steps, self._loaded = self._loaded, 0
        self.ranks.steps += steps
        none = [0.0] * self.ranks.world_size
        for phase in (*PHASES, BETWEEN):
            before = self.ranks.seconds.get(phase, none)
            now = event["rank_seconds"][phase] if phase in PHASES else event["rank_seconds"].get(phase, none)
            self.ranks.seconds[phase] = [a + steps * float(b) for a, b in zip(before, now, strict=True)]
        for kind, held in event.get("memory", {}).items():
            for rank, amount in enumerate(held):
                if amount:
                    self._add(f"{kind} memory", f"rank {rank}", at, int(amount))

    def _add(self, group: str, name: str, at: Position, value: float | None) -> None:
        self.series.setdefault((group, str(name)), Thinner(_LEVELS)).add(at, (value,))

    def _started(self, event: Mapping[str, Any], seconds: float) -> None:
        self.generations.append(event)
        self.finished = None
        if int(event["world_size"]) != self.ranks.world_size:
            self.ranks = RankSums(int(event["world_size"]), since_step=self.last.step + 1)
            self._loaded = 0
        text = f"{event['world_size']} ranks, {event['shards']} shards"
        self._note(str(event["event"]), self._place(seconds), text)

    def _resumed(self, event: Mapping[str, Any], seconds: float) -> None:
        at = self._place(seconds, int(event["step"]))
        if at.step > self.last.step:  # it begins here, with the checkpoint of another run
            self.ranks.since_step = at.step + 1
        self._note("resumed", at, f"after step {event['step']}, from {event['checkpoint']}")

    def _eval(self, event: Mapping[str, Any], seconds: float) -> None:
        metrics = {name: _number(value) for name, value in event["metrics"].items()}
        for name, value in metrics.items():
            self.evaluated[str(name)] = value
            self._add("eval", name, self._place(seconds, int(event["step"])), value)
        self._beside(EVALUATION, event.get("rank_seconds", ()))

    def _beside(self, what: str, seconds: Sequence[float]) -> None:
        if len(seconds) == self.ranks.world_size:
            before = self.ranks.seconds.get(what, [0.0] * len(seconds))
            self.ranks.seconds[what] = [a + float(b) for a, b in zip(before, seconds, strict=True)]

    def _checkpoint(self, event: Mapping[str, Any], seconds: float) -> None:
        others = [0.0] * (self.ranks.world_size - 1)  # rank zero alone stands still
        self._beside(CHECKPOINT, [float(event["seconds"]), *others])
        self.checkpoints.append((self._place(seconds), int(event["step"])))

    def _failed(self, event: Mapping[str, Any], seconds: float) -> None:
        phase = str(event["phase"])
        place = ", ".join(filter(None, [where(event["step"], phase), phase]))
        self.last = self._place(seconds)
        self._note("worker_failed", self.last, f"rank {event['rank']}{place and f' ({place})'}: {event['cause']}")

    def _warning(self, event: Mapping[str, Any], seconds: float) -> None:
        self._note("warning", self._place(seconds), str(event["text"]))

    def _preempted(self, event: Mapping[str, Any], seconds: float) -> None:
        saved, step = event["checkpoint"], int(event["step"])
        kept = "saved" if saved == step else "not saved" if saved is None else f"the checkpoint of step {saved} is kept"
        self.last = self._place(seconds)
        self._note("preempted", self.last, f"by {event['signal']} after step {step}, {kept}")

    def _finished(self, event: Mapping[str, Any], seconds: float) -> None:
        self.finished = event
        self.last = self._place(seconds)
        self._note("run_finished", self.last, f"{event['steps']} steps")


_STARTS = ("run_started", "restarted")
_HANDLERS: Mapping[str, Callable[[History, Mapping[str, Any], float], None]] = {
    "step": History._step,
    "eval": History._eval,
    "checkpoint": History._checkpoint,
    "run_started": History._started,
    "restarted": History._started,
    "resumed": History._resumed,
    "worker_failed": History._failed,
    "preempted": History._preempted,
    "warning": History._warning,
    "run_finished": History._finished,
}


def fold(name: str, config: Mapping[str, Any], lines: Iterable[bytes]) -> History:
    """Pure: the lines of events.jsonl -> what the page shows; a line that is no event is counted and passed over."""
    history = History(name, config)
    for line in lines:
        try:
            history.take(json.loads(line, parse_constant=_not_finite))
        except (ValueError, TypeError, KeyError, AttributeError):
            history.unreadable += 1
    return history


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _not_finite(_word: str) -> float:
    return math.nan


def read(run_dir: RunDir) -> History:
    """What a run directory holds.

    Raises:
        UsageError: it is not the directory of a run that trained.
    """
    try:
        config = json.loads(run_dir.config.read_bytes())
    except (OSError, ValueError):
        config = {}  # a run that failed before its first step has none
    try:
        with run_dir.events.open("rb") as lines:
            name = run_dir.path.absolute().name
            return fold(name, config if isinstance(config, dict) else {}, lines)
    except OSError as error:
        raise UsageError(
            f"{run_dir.path} is expected to be a run directory with events.jsonl, but: {error.strerror}",
            "runs/<recipe> is where a run is kept unless --run-dir was given",
        ) from None


def steps_in_common(left: History, right: History) -> int:
    """How many steps both tell of."""
    return sum(1 for _ in _both(left, right))


def first_difference(left: History, right: History) -> int | None:
    """The first step whose loss has other bits, None where all steps that both tell of are equal."""
    return next((step for step, x, y in _both(left, right) if x.hex() != y.hex()), None)


def _both(left: History, right: History) -> Iterator[tuple[int, float, float]]:
    """A step and its two losses; steps whose line one of them lacks or can't be read are passed over."""
    others = zip(right.loss_steps, right.losses, strict=True)
    end = (sys.maxsize, math.nan)
    at, theirs = next(others, end)
    for step, loss in zip(left.loss_steps, left.losses, strict=True):
        while at < step:
            at, theirs = next(others, end)
        if at == step:
            yield step, loss, theirs
