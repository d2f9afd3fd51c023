"""The complete list of what a run needs to go on: nothing else is state, and none of it belongs to a rank.

Random numbers are keyed by position, so there is no generator state; losses that were not flushed are never saved,
because a checkpoint is taken after a flush.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from samestep.train.observe.ledger import EpochSums
from samestep.train.parallel.no_buffers import ChangingBuffers, NoBuffers
from samestep.train.parallel.shards import StepPlan
from samestep.train.recipe import Components
from samestep.train.scaling import Scaling
from samestep.train.state.as_saved import (
    described,
    laid_out,
    load_optimizer,
    make_writable,
    require_same_dtypes,
    require_same_optimizer,
    strides_of,
)
from samestep.train.state.checkpoint import Snapshot
from samestep.train.state.codec import decode, encode, not_finite, unshared
from samestep.train.state.held import bring_back


@dataclass(slots=True)
class TrainState:
    """Counters of the run and the objects whose state it has.

    Attributes:
        step: optimizer steps completed.
        epoch: epochs completed.
        cursor: samples of finished steps in the current epoch.
        started_at: wall clock at the first start, seconds since 1970.
        restarts: how often a checkpoint was loaded.
        sums: losses of those steps.
        useful_seconds: time spent in steps that count, over all starts.
        metrics: values of the last evaluation.
        passed_over: steps, counted from 1, whose batch is left out because it was not finite.
        best_step: steps of the best checkpoint by the chosen metric, `best_value` its value.
        loaded_step: steps of the checkpoint that was loaded last.
        never_finite: see `note_not_finite`.
        buffers: knows which ones change, and which of these the model's state_dict leaves out.
    """

    components: Components
    scaler: Scaling
    ema: AveragedModel | None
    facts: dict[str, Any]
    step: int = 0
    epoch: int = 0
    cursor: int = 0
    restarts: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    useful_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    started_at: float = field(default_factory=time.time)
    best_step: int | None = None
    best_value: float | None = None
    loaded_step: int | None = None
    never_finite: dict[str, Tensor] = field(default_factory=dict)
    buffers: ChangingBuffers = field(default_factory=NoBuffers)
    passed_over: set[int] = field(default_factory=set)
    _built: dict[str, bool] = field(init=False)  # whether a parameter trained where training began

    def __post_init__(self) -> None:
        self._built = {name: p.requires_grad for name, p in self.components.model.named_parameters()}

    def advance(self, plan: StepPlan) -> None:
        """A step is done."""
        self.step, self.cursor = plan.step + 1, plan.end

    def end_epoch(self) -> None:
        """All samples of the epoch were used."""
        self.epoch, self.cursor = self.epoch + 1, 0
        self.sums = EpochSums()

    def note_best(self, rule: str | None) -> bool:
        """Whether the last evaluation was the best so far by `max:METRIC` or `min:METRIC`; remembers it.

        What is not finite is no measure of anything, so it is never the best.
        """
        if rule is None:
            return False
        direction, _, name = rule.partition(":")
        value = self.metrics[name]
        before = self.best_value
        if before is None or not math.isfinite(before):  # as older code may have saved it
            before = -math.inf if direction == "max" else math.inf
        better = math.isfinite(value) and (value > before if direction == "max" else value < before)
        if better:
            self.best_step, self.best_value = self.step, value
        return better

    def note_not_finite(self) -> None:
        """Let buffers be NaN or infinite where they are so now, before training begins: a mask of -inf is no fault.

        Whatever was saved had passed the same test, so a run that goes on, on any rank, finds what it began with.
        """
        parameters = {name for name, _ in self.components.model.named_parameters(remove_duplicate=False)}
        buffers = {name: tensor for name, tensor in self.capture(0).weights.items() if name not in parameters}
        bad = {name: tensor for name, tensor in buffers.items() if not_finite({name: tensor})}
        self.never_finite = {name: ~torch.isfinite(tensor).cpu() for name, tensor in bad.items()}

    def capture(self, events_offset: int) -> Snapshot:
        """The state as it is now; tensors are the live ones.

        Raises:
            UsageError: some part of it could only be saved with pickle.
        """
        model_json, model_tensors = encode(dict(self.components.model.state_dict()), "model")
        weights, aliases = unshared({name.removeprefix("model."): t for name, t in model_tensors.items()})
        trees, tensors = encode(self._trees(), "state")
        other, other_aliases = unshared(tensors)
        state = {
            "counters": {
                "step": self.step,
                "epoch": self.epoch,
                "restarts": self.restarts,
                "cursor": self.cursor,
                "useful_seconds": self.useful_seconds,
                "metrics": self.metrics,
                "started_at": self.started_at,
                "passed_over": sorted(self.passed_over),
                "best": [self.best_step, self.best_value],
                "sums": [self.sums.total, self.sums.weight, self.sums.samples, self.sums.seconds],
            },
            "events_offset": events_offset,
            "model": model_json,
            "aliases": aliases,
            "trees": trees,
            "tree_aliases": other_aliases,
            "strides": strides_of(other),
            "trains": self._trains_otherwise(),
            "changing": sorted(self.buffers.changing or self.buffers.known),
            "optimizer": described(self.components.optimizer, self.components.model),
        }
        facts = {"epoch": self.epoch, "cursor": self.cursor, **self.facts}
        return Snapshot(self.step, weights, other, state, facts, self.never_finite)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; the model's names and shapes have to fit.

        Raises:
            RuntimeError: they do not (torch's message names them).
        """
        counters = snapshot.state["counters"]
        self.step, self.epoch, self.cursor = counters["step"], counters["epoch"], counters["cursor"]
        self.loaded_step = self.step
        self.useful_seconds, self.metrics = counters["useful_seconds"], counters["metrics"]
        self.started_at = counters["started_at"]
        self.restarts = counters["restarts"] + 1
        self.best_step, self.best_value = counters["best"]
        self.sums = EpochSums(*counters["sums"])
        self.passed_over.clear()  # the same object: the guard looks there
        self.passed_over.update(counters.get("passed_over", []))
        trains = self._built | snapshot.state.get("trains", {})
        for name, parameter in self.components.model.named_parameters():
            parameter.requires_grad_(trains.get(name, parameter.requires_grad))
        weights = {f"model.{name}": tensor for name, tensor in snapshot.weights.items()}
        weights |= {f"model.{name}": snapshot.weights[first] for name, first in snapshot.state["aliases"].items()}
        require_same_dtypes(self.components.model, snapshot.weights)
        make_writable(self.components.model, snapshot.weights)
        bring_back(self.components.model, decode(snapshot.state["model"], weights))
        tensors = laid_out(snapshot.tensors, snapshot.state.get("strides", {}))
        tensors |= {name: tensors[first].clone() for name, first in snapshot.state["tree_aliases"].items()}
        trees = decode(snapshot.state["trees"], tensors)
        for part, here in (("scheduler", self.components.scheduler), ("ema", self.ema)):
            if (here is None) != (trees.get(part) is None):
                raise ValueError(f"{part} is None {'there' if here is not None else 'here'} alone")
        load_optimizer(self.components.optimizer, trees["optimizer"])
        optimizer = described(self.components.optimizer, self.components.model)
        require_same_optimizer(optimizer, snapshot.state.get("optimizer", optimizer))
        if self.components.scheduler is not None:
            self.components.scheduler.load_state_dict(trees["scheduler"])
        self.scaler.load_state_dict(trees["scaler"])
        if self.ema is not None:
            make_writable(self.ema, [n for n in trees["ema"] if f"state.ema.{n}" not in snapshot.state["tree_aliases"]])
            self.ema.load_state_dict(trees["ema"])
        self.buffers.known = set(snapshot.state.get("changing", []))
        for name, value in trees.get("buffers", {}).items():
            buffer = self.components.model.get_buffer(name)
            if buffer.shape != value.shape and self.step:
                raise ValueError(f"size mismatch for {name}: {tuple(value.shape)} there, {tuple(buffer.shape)} here")
            # before the first step all are there, also masks of a batch's length, and views that can't be written to
            if buffer.shape == value.shape and not torch.equal(buffer.cpu(), value.cpu()):
                buffer.copy_(value)

    def _trains_otherwise(self) -> dict[str, bool]:
        """Parameters that a forward has frozen or thawed since the model was built."""
        now = {name: p.requires_grad for name, p in self.components.model.named_parameters()}
        return {name: trains for name, trains in now.items() if trains != self._built.get(name, trains)}

    def _trees(self) -> dict[str, Any]:
        scheduler = self.components.scheduler
        return {
            "optimizer": self.components.optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
            "ema": dict(self.ema.state_dict()) if self.ema is not None else None,
            "buffers": self.buffers.unsaved(),
        }
