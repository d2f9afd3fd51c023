"""A few float64 numbers of each shard, summed along the tree (see StepSums for which)."""

from __future__ import annotations

import torch
from torch import Tensor

from samestep.train.parallel.exchange import Exchange, Flight, present_roots
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import Fold, Span, StepPlan


class ShardSums:
    """Used as begin, push for each owned shard, finish; `start` in between where something can be done meanwhile."""

    def __init__(self, group: Group, exchange: Exchange, shards: int, device: torch.device) -> None:
        self.group = group
        self.exchange = exchange
        self.shards = shards
        self.device = device
        self._nothing = torch.empty(0, dtype=torch.float64, device=device)

    def begin(self, plan: StepPlan, width: int) -> None:
        """Expect `width` numbers of each shard, on all ranks alike; with 0 nothing is pushed, nor sent."""
        self.width = width
        self._flight: Flight | None = None
        self._total: Tensor | None = None
        if width:
            self._present = min(plan.samples, self.shards)
            spans = present_roots(self.group.world_size, self.shards, self._present)[self.group.rank]
            self._folds: dict[Span, Fold[Tensor]] = {span: Fold(span, torch.add) for span in spans}

    def push(self, shard: int, numbers: Tensor) -> None:
        """Take those of the next owned shard, float64, shape (width,)."""
        fold = next(fold for span, fold in self._folds.items() if span[0] <= shard < span[1])
        fold.push(shard, numbers)

    def start(self) -> None:
        """Send this rank's sums. A collective, issued by all ranks between the same others."""
        for span, fold in self._folds.items():
            for shard in range(max(self._present, span[0]), span[1]):
                fold.push(shard, None)
        mine = [fold.total for fold in self._folds.values() if fold.total is not None]
        like = mine[0] if mine else torch.zeros(self.width, dtype=torch.float64, device=self.device)
        self._flight = self.exchange.start(mine, like, self._present)

    def finish(self) -> Tensor:
        """The sums over all shards, float64, shape (width,), as often as asked; starts the exchange if nobody has."""
        if not self.width:
            return self._nothing
        if self._flight is None:
            self.start()
        assert self._flight is not None
        if self._total is None:
            self._total = self._flight.finish()
        return self._total
