"""Metrics that keep states, as torchmetrics has them, over shards and ranks: same value on any world size.

Each shard is given to the metric alone, and the states of all shards are reduced in the order of the shards, as
torchmetrics reduces those of processes: a shard, not a rank, is the process here. So integer states are exact, and
float states are summed in one order on any number of ranks; they differ within rounding from one process that updates
the metric batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.parallel.group import Group

Inputs = Callable[[Any, Any], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class StateMetric:
    """A torchmetrics metric whose `update` gets what `inputs(model, batch)` returns.

    A bare metric in `Components.metrics` stands for one that is updated with `(model(x), y)`, for batches `(x, y)`.
    """

    metric: Any
    inputs: Inputs | None = None

    @classmethod
    def of(cls, function: Any) -> StateMetric | None:
        """The metric, if it is one that keeps states; None for a plain function."""
        if isinstance(function, cls):
            return function
        keeps = all(hasattr(function, name) for name in ("update", "compute", "reset", "metric_state"))
        return cls(function) if keeps else None

    def refuse_states_elsewhere(self, name: str) -> None:
        """See that the metric's states are its own: those of a metric inside of it would be lost.

        Raises:
            UsageError: they are not.
        """
        what = type(self.metric).__name__
        if isinstance(self.metric, nn.ModuleDict):
            raise UsageError(
                f"metric {name} is expected to be one metric, but is a {what} of several",
                "pass its metrics one by one: metrics=dict(collection.items())",
            )
        inside = [type(each).__name__ for each in self._inside() if each is not self.metric]
        if inside or not getattr(self.metric, "metric_state", None):
            holds = f"holds {inside[0]} and " if inside else ""
            raise UsageError(
                f"metric {name} is expected to have states of its own, but {what} {holds}has its states elsewhere",
                "pass the metric inside of it, with inputs=… for what is done before it; scale its value yourself",
            )

    def _inside(self) -> list[Any]:
        modules = self.metric.modules() if isinstance(self.metric, nn.Module) else ()
        return [each for each in modules if hasattr(each, "metric_state")]


def supervised_inputs(model: Any, batch: Any) -> tuple[Any, ...]:
    """`(model(x), y)`.

    Raises:
        UsageError: the batch is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(
            f"a metric that keeps states is expected to get a batch (x, y), but the batch is {type(batch).__name__}",
            "metrics={'name': StateMetric(metric, inputs=lambda model, batch: (predictions, targets))}",
        )
    x, y = batch
    return model(x), y


@dataclass(slots=True)
class StateMetrics:
    """All of a recipe's, for one evaluation after another."""

    metrics: dict[str, StateMetric]
    group: Group
    device: torch.device
    _states: dict[str, Tensor] = field(default_factory=dict)  # "shard/metric/state[/part]"

    def begin(self) -> None:
        """Forget the evaluation before."""
        self._states = {}
        for each in self.metrics.values():
            each.metric.to(self.device)
            each.metric.distributed_available_fn = lambda: False  # shards are reduced here, ranks need not be

    def add(self, model: Any, batch: Any, place: int) -> None:
        """Take one shard; `place` counts the shards of the whole evaluation, over all ranks."""
        shared: tuple[Any, ...] | None = None
        for name, each in self.metrics.items():
            if each.inputs is None:
                shared = shared or supervised_inputs(model, batch)
            each.metric.reset()
            each.metric.update(*(each.inputs(model, batch) if each.inputs else shared or ()))
            for state, value in each.metric.metric_state.items():
                parts = enumerate(value) if isinstance(value, list) else [(-1, value)]
                for part, tensor in parts:
                    self._states[f"{place}/{name}/{state}/{part}"] = (
                        tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                    )

    def values(self) -> dict[str, float]:
        """One value a metric, the same on every rank. A collective.

        Raises:
            UsageError: a metric computes something that is not one number.
        """
        if not self.metrics:
            return {}
        whole: dict[str, Tensor] = {}
        for data in self.group.gather_bytes(save(self._states)):
            whole |= load(data)
        places = sorted({int(key.partition("/")[0]) for key in whole})
        return {name: self._value(name, each.metric, whole, places) for name, each in self.metrics.items()}

    def _value(self, name: str, metric: Any, whole: Mapping[str, Tensor], places: list[int]) -> float:
        metric.reset()
        for state, default in metric._defaults.items():
            keys = (f"{place}/{name}/{state}" for place in places)
            if isinstance(default, list):
                setattr(metric, state, [part.to(self.device) for key in keys for part in _parts(whole, key)])
            else:
                stacked = torch.stack([whole[f"{key}/-1"] for key in keys]).to(self.device)
                reduction = metric._reductions[state]
                setattr(metric, state, stacked if reduction is None else reduction(stacked))
        metric._update_count = len(places)
        value = metric.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(
                f"metric {name} is expected to compute one number, but computes {_shape(value)}",
                "choose an average, or wrap it in a metric whose compute() returns the number to report",
            )
        return float(value)


def _parts(whole: Mapping[str, Tensor], key: str) -> list[Tensor]:
    found: list[Tensor] = []
    while f"{key}/{len(found)}" in whole:
        found.append(whole[f"{key}/{len(found)}"])
    return found


def _shape(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
