"""Pure: events so far -> how a run stands. Of old steps nothing is kept."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samestep.launcher.heartbeat import where

PHASES = ("data", "forward", "backward", "sync", "optimizer")
_WINDOW = 100  # steps that speed, shares and the slowest rank are taken from
_WAITING = "sync"  # the phase in which a rank waits for others: it is longest on the fastest one
_PACE = 2000  # steps that the remaining time is taken from


class _Recent(NamedTuple):
    samples: int
    seconds: float  # of the slowest rank
    phases: tuple[float, ...]  # means
    excess: tuple[float, ...]  # slowest rank over the mean, by phase
    slowest: tuple[int, ...]


@dataclass(slots=True)
class Standing:
    """How a run stands. `status`: starting, training, failed, or finished; who watches knows whether it still runs."""

    total: int | None = None  # steps of the whole run
    epochs: int | None = None
    status: str = "starting"
    step: int = 0
    epoch: int = 0
    loss: float | None = None  # None: not finite, if there was a step at all
    memory: tuple[str, int, int] | None = None  # of devices where there are any: kind, most bytes, who held them
    metrics: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 0
    restarts: int = 0
    saved: int | None = None  # step of the newest checkpoint
    failure: str = ""
    warnings: int = 0
    digest: str = ""
    began: float | None = None  # times of the first and the newest event, seconds since the epoch
    latest: float = 0.0
    stepped: float = 0.0  # time of the newest step event
    _recent: deque[_Recent] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_PACE))

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take what config.json says of the whole run."""
        total, options = config.get("total_steps"), config.get("config")
        self.total = total if isinstance(total, int) else None
        epochs = options.get("epochs") if isinstance(options, dict) else None
        self.epochs = epochs if isinstance(epochs, int) else None

    def take(self, event: Mapping[str, Any]) -> None:
        """One event, in the order of the file; what is not as its name says is passed over."""
        try:
            time = float(event.get("time", 0.0))
            handle = _HANDLERS.get(str(event.get("event")))
            if handle is not None:
                handle(self, event)
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        self.began = time if self.began is None else self.began
        self.latest = max(self.latest, time)

    @property
    def samples_per_s(self) -> float | None:
        """Of the last steps."""
        seconds = sum(recent.seconds for recent in self._recent)
        return sum(recent.samples for recent in self._recent) / seconds if seconds else None

    @property
    def shares(self) -> dict[str, float]:
        """Part of the last steps' time that each phase took, from 0 to 1; empty without a step."""
        sums = [sum(values) for values in zip(*(recent.phases for recent in self._recent), strict=True)]
        whole = sum(sums)
        return dict(zip(PHASES, (value / whole for value in sums), strict=True)) if whole else {}

    @property
    def slowest(self) -> tuple[int, str] | None:
        """The rank that most often took longest in the phase for which others waited most; None with one rank."""
        if self.ranks < 2 or not self._recent:
            return None
        excess = [sum(values) for values in zip(*(recent.excess for recent in self._recent), strict=True)]
        excess[PHASES.index(_WAITING)] = -1.0
        worst = excess.index(max(excess))
        rank = Counter(recent.slowest[worst] for recent in self._recent).most_common(1)[0][0]
        return rank, PHASES[worst]

    @property
    def remaining(self) -> float | None:
        """Seconds to the last step at the pace of the last steps, evaluations and all; None if not known."""
        if self.total is None or not self._recent:
            return None
        (since, first), (until, last) = self._pace[0], self._pace[-1]
        if last > first and until > since:
            return (self.total - self.step) * (until - since) / (last - first)
        return (self.total - self.step) * sum(recent.seconds for recent in self._recent) / len(self._recent)

    def _step(self, event: Mapping[str, Any]) -> None:
        spreads, rate = event.get("seconds") or {}, float(event.get("samples_per_s") or 0.0)
        samples, time = int(event.get("samples") or 0), float(event.get("time", 0.0))
        self.step, self.epoch = int(event["step"]), int(event["epoch"])
        self.loss = self.loss if event.get("weightless") else event["loss"]
        self.status, self.stepped = "training", time
        of_phase = [spreads[phase] for phase in PHASES if phase in spreads]
        if len(of_phase) == len(PHASES):
            self._recent.append(
                _Recent(
                    samples,
                    samples / rate if rate else 0.0,
                    tuple(float(spread["mean"]) for spread in of_phase),
                    tuple(float(spread["max"]) - float(spread["mean"]) for spread in of_phase),
                    tuple(int(spread["slowest_rank"]) for spread in of_phase),
                )
            )
        if not self._pace or self._pace[-1][0] != time:
            self._pace.append((time, self.step))
        self._pace[-1] = (time, self.step)
        for kind in ("host", "device"):
            held = event.get("memory", {}).get(kind, [])
            if any(held):
                self.memory = (kind, max(held), held.index(max(held)))

    def _started(self, event: Mapping[str, Any]) -> None:
        self.status, self.failure, self.digest = "starting", "", ""
        self.ranks, self.restarts = int(event["world_size"]), int(event["generation"])
        self._recent.clear()
        self._pace.clear()

    def _resumed(self, event: Mapping[str, Any]) -> None:
        self.step, self.epoch = int(event["step"]), int(event["epoch"])
        self.saved = self.step or None

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        self.metrics = dict(event["metrics"])

    def _checkpoint(self, event: Mapping[str, Any]) -> None:
        self.saved = int(event["step"])

    def _failed(self, event: Mapping[str, Any]) -> None:
        at = where(event.get("step"), str(event.get("phase", "")))
        at = f" in {at}" if at.startswith("step") else f" {at}" if at else ""
        self.status, self.failure = "failed", f"rank {event['rank']} failed{at}: {event['cause']}"

    def _warned(self, _event: Mapping[str, Any]) -> None:
        self.warnings += 1

    def _finished(self, event: Mapping[str, Any]) -> None:
        self.status, self.step, self.digest = "finished", int(event["steps"]), str(event["digest"])


_HANDLERS: Mapping[str, Callable[[Standing, Mapping[str, Any]], None]] = {
    "step": Standing._step,
    "run_started": Standing._started,
    "restarted": Standing._started,
    "resumed": Standing._resumed,
    "eval": Standing._evaluated,
    "checkpoint": Standing._checkpoint,
    "worker_failed": Standing._failed,
    "warning": Standing._warned,
    "run_finished": Standing._finished,
}


def begins(event: Mapping[str, Any]) -> bool:
    """Whether it says that ranks have started: config.json, written just before, is theirs from then on."""
    return event.get("event") in ("run_started", "restarted")
