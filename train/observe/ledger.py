"""Finished steps between two log intervals, and the running average of the epoch.

Losses stay on the device until `flush`, which reads them all at once and exchanges the ranks' phase times in one
gather.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samestep.launcher.contract import Spread
from samestep.train.observe.phases import PHASES, Reading
from samestep.train.parallel.fingerprint import StateFingerprint
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import StepPlan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step as it is reported; `loss` is the objective, NaN where the step had no weight."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    loss: float
    samples: int
    seconds: dict[str, Spread]
    wall_seconds: float  # longest of the ranks
    extra: dict[str, float]


@dataclass(slots=True)
class EpochSums:
    """What the epoch's average loss is made of; part of the state, since an epoch may be resumed."""

    total: float = 0.0
    weight: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Average weighted by samples, or by the loss's own weights."""
        return self.total / self.weight if self.weight else float("nan")


@dataclass(slots=True)
class Ledger:
    """Collects steps of this rank and turns them into records of all ranks."""

    group: Group
    device: torch.device
    fingerprint: StateFingerprint
    epoch: EpochSums = field(default_factory=EpochSums)
    _pending: list[tuple[StepPlan, Tensor, Reading]] = field(default_factory=list)

    def add(self, plan: StepPlan, sums: Tensor, reading: Reading) -> None:
        """Take a finished step: its sums (see StepTally.finish) still on the device."""
        self._pending.append((plan, sums, reading))

    def flush(self, extras: list[str]) -> list[StepRecord]:
        """Records of the steps added since the last flush, equal on every rank. A collective.

        Raises:
            UsageError: a rank holds other weights, or stands at another step (see StateFingerprint.compare).
        """
        if not self._pending:
            return []
        seconds = torch.tensor([reading() for _, _, reading in self._pending], dtype=torch.float64, device=self.device)
        last = self._pending[-1][0]
        mark = self.fingerprint.row(last.step + 1, last.end).view(torch.float64)  # carried as bits, never computed with
        gathered = self.group.gather(torch.cat([seconds.flatten(), mark]))
        self.fingerprint.compare(gathered[:, seconds.numel() :].contiguous().view(torch.int64), last.step + 1)
        by_rank = gathered[:, : seconds.numel()].view(-1, *seconds.shape).cpu()
        sums = torch.stack([sums for _, sums, _ in self._pending]).cpu().tolist()
        records = []
        for index, (plan, _, _) in enumerate(self._pending):
            total, weight, *more = sums[index]
            self.epoch.total += total
            self.epoch.weight += weight
            self.epoch.samples += plan.samples
            records.append(
                StepRecord(
                    step=plan.step + 1,
                    epoch=plan.epoch,
                    loss=total / weight if weight else float("nan"),
                    samples=plan.samples,
                    seconds=_spreads(by_rank[:, index]),
                    wall_seconds=float(by_rank[:, index].sum(1).max()),
                    extra={
                        name: value / weight if weight else float("nan")
                        for name, value in zip(extras, more, strict=True)
                    },
                )
            )
        self._pending.clear()
        self.epoch.seconds += sum(record.wall_seconds for record in records)
        return records


def _spreads(seconds: Tensor) -> dict[str, Spread]:
    """Per phase mean, max and slowest rank of a (world_size, phases) table."""
    mean, (most, slowest) = seconds.mean(0).tolist(), seconds.max(0)
    columns = zip(PHASES, mean, most.tolist(), slowest.tolist(), strict=True)
    return {name: Spread(mean=m, max=x, slowest_rank=int(r)) for name, m, x, r in columns}
