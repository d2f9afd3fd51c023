"""What of a step is summed over all shards beside the gradients, and when: weights of the loss, the buffers' numbers.

The update needs to know on the host whether the weights sum to nothing. A CPU knows at once, so all numbers travel in
one exchange, while the ranks wait for their gradients anyway. A host that reads a number from a GPU waits for all that
was launched before; there weights are summed on a stream of their own as soon as the forwards are through, and are on
the host while backward runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from samestep.train.parallel.exchange import Exchange
from samestep.train.parallel.group import Group
from samestep.train.parallel.shard_sums import ShardSums
from samestep.train.parallel.shards import StepPlan


class Sums(NamedTuple):
    """Over all shards of a step.

    Attributes:
        weights: float64, of shape (1,) on the device, or (0,) where nothing was expected.
        weight: the same number on the host; NaN where nothing was expected.
        buffers: float64, as many numbers as were expected.
    """

    weights: Tensor
    weight: float
    buffers: Tensor


def divide(gradients: list[Tensor], sums: Sums) -> None:
    """Divide in place by the sum of the weights that a loss brought."""
    # torch divides all at once by a weight of their own type, one after the other by another; the bits are the same
    alike = all(gradient.dtype == torch.float32 for gradient in gradients)
    torch._foreach_div_(gradients, sums.weights[0].float() if alike else sums.weights[0])


class StepSums(Protocol):
    """Used as begin; weigh after the forward and add after the backward of each shard of this rank; finish."""

    def begin(self, plan: StepPlan, weights: int, buffers: int, last: int | None) -> None:
        """Expect so many numbers of each shard, on all ranks alike; after shard `last` they are sent at once."""

    def weigh(self, shard: int, weights: Tensor) -> None:
        """Take the weights of a shard, float64."""

    def add(self, shard: int, numbers: Tensor) -> None:
        """Take the buffers' numbers of a shard, float64, after its weights."""

    def finish(self) -> Sums:
        """A collective, where anything was expected."""


@dataclass(slots=True)
class TogetherSums:
    """On a CPU: one exchange."""

    sums: ShardSums
    _weights: int = 0
    _last: int | None = None
    _of_shard: Tensor = field(init=False)

    def begin(self, plan: StepPlan, weights: int, buffers: int, last: int | None) -> None:
        """See StepSums."""
        self._weights, self._last = weights, last
        self.sums.begin(plan, weights + buffers)

    def weigh(self, shard: int, weights: Tensor) -> None:  # noqa: ARG002 (StepSums' form)
        """See StepSums."""
        self._of_shard = weights

    def add(self, shard: int, numbers: Tensor) -> None:
        """See StepSums."""
        if self.sums.width:
            self.sums.push(shard, torch.cat([self._of_shard, numbers]))
            if shard == self._last:
                self.sums.start()

    def finish(self) -> Sums:
        """See StepSums."""
        total = self.sums.finish()
        if not self.sums.width:
            return Sums(total, math.nan, total)
        weights, buffers = total[: self._weights], total[self._weights :]
        return Sums(weights, weights.item() if self._weights else math.nan, buffers)


@dataclass(slots=True)
class EarlySums:
    """On a GPU: the weights' exchange goes ahead of the last backward; without other ranks it is a copy to the host."""

    weights: ShardSums
    buffers: ShardSums
    device: torch.device
    _last: int | None = None
    _sent: bool = False
    _use: torch.cuda.Stream = field(init=False)
    _aside: torch.cuda.Stream = field(init=False)
    _host: Tensor = field(init=False)
    _known: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    _there: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def __post_init__(self) -> None:
        self._use = torch.cuda.current_stream(self.device)
        self._aside = torch.cuda.Stream(self.device) if self.weights.group.world_size > 1 else self._use
        self._host = torch.empty(1, dtype=torch.float64, pin_memory=True)

    def begin(self, plan: StepPlan, weights: int, buffers: int, last: int | None) -> None:
        """See StepSums."""
        self._last, self._sent = last, False
        self.weights.begin(plan, weights)
        self.buffers.begin(plan, buffers)

    def weigh(self, shard: int, weights: Tensor) -> None:
        """See StepSums."""
        if self.weights.width:
            self.weights.push(shard, weights)
            if shard == self._last:
                self._send()

    def add(self, shard: int, numbers: Tensor) -> None:
        """See StepSums."""
        if self.buffers.width:
            self.buffers.push(shard, numbers)
            if shard == self._last:
                self.buffers.start()

    def finish(self) -> Sums:
        """See StepSums."""
        weight = math.nan
        if self.weights.width:
            if not self._sent:
                self._send()
            self._use.wait_event(self._there)
            self._there.synchronize()
            weight = self._host.item()
        return Sums(self.weights.finish(), weight, self.buffers.finish())

    def _send(self) -> None:
        self._known.record(self._use)
        self._aside.wait_event(self._known)
        with self._aside:
            self._host.copy_(self.weights.finish(), non_blocking=True)
            self._there.record(self._aside)
        self._sent = True


def step_sums(group: Group, exchange: Exchange, shards: int, device: torch.device) -> StepSums:
    """What fits the device."""
    sums = ShardSums(group, exchange, shards, device)
    if device.type == "cuda":
        return EarlySums(sums, ShardSums(group, exchange, shards, device), device)
    return TogetherSums(sums)
