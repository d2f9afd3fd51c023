"""Losses and weights of a step over all shards of all ranks, summed in float64 along the tree, on the device.

Each shard contributes a row [total, weight, extra...]. The gather starts as soon as this rank's last forward is done,
so it runs while backward does. Nothing is read by the host here, except a token-weighted step's weight, which decides
whether there is an update at all.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import StepPlan, owned_span, tree_sum
from samestep.train.recipe import SampleWeighted, Weighted


class StepTally:
    """Used as begin, add for each owned shard, finish."""

    def __init__(self, group: Group, shards: int, device: torch.device) -> None:
        self.group = group
        self.shards = shards
        self.device = device
        self.owned = owned_span(group.rank, group.world_size, shards)
        self.width = max(
            hi - lo for lo, hi in (owned_span(r, group.world_size, shards) for r in range(group.world_size))
        )
        self.extras: list[str] | None = None  # agreed by all ranks in the first step, as is the next
        self.own_weights = False  # the loss brings weights that are not sample counts

    def begin(self, plan: StepPlan) -> None:
        """Expect the rows of one step."""
        self._plan = plan
        self._rows: list[Tensor] = []
        self._expected = plan.present(self.owned)
        self._own_weights = False
        self._all: Tensor | None = None
        if not self._expected:
            self._start([])

    def add(self, outcome: Weighted) -> None:
        """Take one shard's loss; the last one starts the gather."""
        self._own_weights |= not isinstance(outcome, SampleWeighted)
        if self.extras is None:
            self._first_extras = list(outcome.log)
        total = outcome.total.detach()
        weight = scalar(outcome.weight, self.device)
        names = self.extras if self.extras is not None else self._first_extras
        values = [
            total.double().reshape(()),
            weight,
            *(scalar(outcome.log[name], self.device) * weight for name in names),
        ]
        self._rows.append(torch.stack(values))
        if len(self._rows) == len(self._expected):
            self._start(list(outcome.log))

    def finish(self) -> Tensor:
        """Sums over all shards, float64, shape (2 + extras,): total, weight, then each extra times weight."""
        assert self._all is not None
        rows: dict[tuple[int, int], Tensor] = {}
        for rank in range(self.group.world_size):
            span = owned_span(rank, self.group.world_size, self.shards)
            for slot, shard in enumerate(self._plan.present(span)):
                rows[shard, shard + 1] = self._all[rank, slot]
        total = tree_sum((0, self.shards), rows, torch.add)
        assert total is not None
        return total

    def _start(self, extras: list[str]) -> None:
        if self.extras is None:
            self._agree(extras)
        assert self.extras is not None
        mine = torch.zeros(self.width, 2 + len(self.extras), dtype=torch.float64, device=self.device)
        for slot, row in enumerate(self._rows):
            mine[slot] = row
        self._all = self.group.gather(mine)

    def _agree(self, extras: list[str]) -> None:
        record = json.dumps({"extras": extras, "own_weights": self._own_weights}).encode()
        records = [json.loads(part) for part in self.group.gather_bytes(record)]
        self.extras = max((part["extras"] for part in records), key=len)
        self.own_weights = any(part["own_weights"] for part in records)


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """float64 scalar tensor on `device`, without gradient and without reading it."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64).reshape(())
    return torch.tensor(float(value), dtype=torch.float64, device=device)
