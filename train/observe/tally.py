"""Losses and weights of a step's shards, a row [total, weight, extra * weight ...] each, in float64.

On a GPU they stay there as tensors; on a CPU, which computes in order, they are read at once, since a number costs less
than a tensor.
They wait as they are for the next log interval (see Ledger). Where samples are the weights, every rank knows their sum;
of a loss that brings its own weights these are also summed over all ranks before the update (see StepSums).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from samestep.launcher.contract import UsageError
from samestep.train.parallel.group import Group, gather_json
from samestep.train.parallel.shards import MicroBatch, StepPlan
from samestep.train.recipe import Outcome, SampleWeighted


class Product(NamedTuple):
    """A number on the device and what it is to be multiplied with in float64, when it is read."""

    tensor: Tensor
    factor: float

    def __float__(self) -> float:
        """Read now."""
        return float(self.tensor) * self.factor


Value = Tensor | Product | float
Values = list[list[Value]]  # of one rank: a list for each shard, of equally many columns


class StepTally:
    """Used as begin, add for each part of each owned shard, `of_shard` after each shard."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        self._reads = device.type == "cpu"
        self._nothing = torch.empty(0, dtype=torch.float64, device=device)
        self.extras: list[str] | None = None  # agreed by all ranks in the first step, as is the next
        self.own_weights = False  # the loss brings weights that are not sample counts

    def begin(self, plan: StepPlan, shards: list[int]) -> None:
        """Expect the rows of one step, one for each of this rank's `shards`."""
        self._plan = plan
        self._values: list[list[Value]] = []
        self._expected = len(shards)
        self._kinds: set[bool] = set()  # of this step's losses so far: whether they bring weights
        self._names = self.extras  # that they log
        self.width = int(self.extras is None or self.own_weights)  # numbers of a shard that are summed at once
        if not self._expected:
            self._complete([])

    def add(self, outcome: Outcome, part: MicroBatch) -> float | None:
        """Take the loss of a shard, or of a part of it; its total where that is read at once.

        Raises:
            UsageError: it brings weights and others did not, or the other way round; it logs other names.
        """
        brings_weights = not isinstance(outcome, SampleWeighted)
        self._kinds.add(brings_weights)
        if self.extras is not None and brings_weights != self.own_weights:
            raise UsageError(
                f"loss is expected to bring weights in every step or in none, but in step {self._plan.step + 1} "
                f"it {'did so first' if brings_weights else 'brought none, unlike before'}",
                "return Weighted(total, weight) always",
            )
        names = self._names if len(self._kinds) == 1 else None  # else _agree says so
        names = sorted(outcome.log) if names is None else names
        if len(names) != len(outcome.log) or not all(name in outcome.log for name in names):
            raise _logs_other(self._plan.step, names, list(outcome.log))
        self._names = names
        total: Value
        if not isinstance(outcome, SampleWeighted):
            total = self._kept(outcome.total)
        elif self._reads:
            total = outcome.read()
        else:
            total = Product(outcome.output.detach(), outcome.weight if outcome.is_mean else 1)
        values = [total, self._kept(outcome.weight)]
        values += [self._kept(outcome.log[name] * outcome.weight) for name in names]
        if part.first:
            self._values.append(values)
        else:
            alike = len(self._kinds) == 1  # else _agree says so
            self._values[-1] = [_plus(*pair, self.device) for pair in zip(self._values[-1], values, strict=alike)]
        if part.last and len(self._values) == self._expected:
            self._complete(names)
        return total if isinstance(total, float) else None

    @property
    def mine(self) -> Values:
        """Of this rank's shards in this step, as they were added."""
        return self._values

    def of_shard(self) -> Tensor:
        """The weight of the shard that was added last, if it has to be summed: float64, shape (1,), else (0,).

        A tensor of its own, since an exchange may leave the sum in it.
        """
        return scalar(self._values[-1][1], self.device, own=True).reshape(1) if self.width else self._nothing

    def _kept(self, value: Tensor | float) -> Tensor | float:
        """The value without its graph: a tensor without dimensions, or the number."""
        if not isinstance(value, Tensor):
            return value
        if self._reads:
            return float(value.item())
        value = value.detach() if value.requires_grad else value
        return value.reshape(()) if value.dim() else value

    def _complete(self, names: list[str]) -> None:
        if self.extras is None:
            self._agree(names)

    def _agree(self, names: list[str]) -> None:
        records = gather_json(self.group, {"extras": names, "own_weights": sorted(self._kinds)})
        kinds = {kind for part in records for kind in part["own_weights"]}
        if len(kinds) > 1:
            raise UsageError(
                "loss is expected to bring weights for every shard of a step or for none, but did so for some of them",
                "return Weighted(total, weight) always",
            )
        names = next((part["extras"] for part in records if part["own_weights"]), [])
        for part in records:
            if part["own_weights"] and sorted(part["extras"]) != sorted(names):
                raise _logs_other(self._plan.step, names, part["extras"])
        self.extras = names
        self.own_weights = True in kinds


def _logs_other(step: int, names: list[str], found: list[str]) -> UsageError:
    here, before = (", ".join(sorted(keys)) or "nothing" for keys in (found, names))
    return UsageError(
        f"loss is expected to log the same values each time, but in step {step + 1} it logs {here} and else {before}",
        "give Weighted.log all of its keys in every call",
    )


def _plus(left: Value, right: Value, device: torch.device) -> Value:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    return scalar(left, device) + scalar(right, device)


def table(steps: list[Values], width: int, columns: int, device: torch.device) -> Tensor:
    """float64 of shape (steps, width, columns), zero where a step has fewer shards; reads nothing from the device."""
    missing: list[Value] = [0.0] * columns
    flat: list[float] = []  # numbers, and factors of what is on the device
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[int], list[Tensor]]] = {}
    for values in steps:
        for value in itertools.chain(*values, *[missing] * (width - len(values))):
            if isinstance(value, int | float):
                flat.append(value)
                continue
            tensor, factor = value if isinstance(value, Product) else (value, 1.0)
            places, tensors = alike.setdefault((tensor.dtype, tensor.device), ([], []))
            places.append(len(flat))
            tensors.append(tensor)
            flat.append(factor)
    result = torch.tensor(flat, dtype=torch.float64).to(device, non_blocking=True)
    for places, tensors in alike.values():
        result[torch.tensor(places).to(device, non_blocking=True)] *= torch.stack(tensors).to(device, torch.float64)
    return result.view(len(steps), width, columns)


def scalar(value: Value, device: torch.device, *, own: bool = False) -> Tensor:
    """float64 scalar tensor on `device`, without gradient and without reading it; with `own` never `value` itself."""
    if isinstance(value, Product):
        return scalar(value.tensor, device) * value.factor
    if isinstance(value, Tensor):
        aside = device.type == "cuda"  # from the host a number is taken over at once
        return value.detach().to(device=device, dtype=torch.float64, non_blocking=aside, copy=own).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)  # without a copy, for which the host waits
