"""Finished steps between two log intervals, and the running average of the epoch.

Losses stay on the device until `flush`, which reads them all at once and exchanges the ranks' phase times in one
gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samestep.launcher.contract import Spread
from samestep.train.observe.memory import KINDS, peak_memory
from samestep.train.observe.phases import BETWEEN, PHASES, Reading
from samestep.train.observe.stragglers import Straggler, StragglerWatch
from samestep.train.observe.tally import Values, table
from samestep.train.parallel.fingerprint import StateFingerprint
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import StepPlan, owned_span, tree_sum

_DIGITS = 7  # of reported seconds: a tenth of a microsecond, and half the time and room that all 17 take

Table = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankLoads:
    """Each rank by itself: mean seconds of PHASES and BETWEEN since the last flush, peak bytes since its start."""

    seconds: dict[str, list[float]]
    memory: dict[str, list[int]]


@dataclass(slots=True)
class StepRecord:
    """One finished step as it is reported; `loss` is the objective, NaN where the step had no weight."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    loss: float
    samples: int
    seconds: dict[str, Spread]
    wall_seconds: float  # longest of the ranks, with the time since the step before
    extra: dict[str, float]
    loads: RankLoads | None = None  # of the last step before a flush


@dataclass(slots=True)
class EpochSums:
    """What the epoch's average loss is made of; part of the state, since an epoch may be resumed."""

    total: float = 0.0
    weight: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def add(self, total: float, weight: float, samples: int, seconds: float) -> None:
        """Take one step."""
        self.total, self.weight = self.total + total, self.weight + weight
        self.samples, self.seconds = self.samples + samples, self.seconds + seconds

    @property
    def loss(self) -> float:
        """Average weighted by samples, or by the loss's own weights."""
        return self.total / self.weight if self.weight else float("nan")


@dataclass(slots=True)
class Ledger:
    """Collects steps of this rank and turns them into records of all ranks."""

    group: Group
    device: torch.device
    shards: int
    fingerprint: StateFingerprint
    epoch: EpochSums = field(default_factory=EpochSums)
    slow_rank: Straggler | None = None  # found by the last flush
    _stragglers: StragglerWatch = field(init=False)
    _pending: list[tuple[StepPlan, Tensor | Values, Reading]] = field(default_factory=list)

    def __post_init__(self) -> None:
        spans = [owned_span(rank, self.group.world_size, self.shards) for rank in range(self.group.world_size)]
        self._stragglers = StragglerWatch([hi - lo for lo, hi in spans])

    def add(self, plan: StepPlan, rows: Tensor | Values, reading: Reading) -> None:
        """Take a finished step: its rows (see StepTally.rows) still on the device."""
        self._pending.append((plan, rows, reading))

    def forget(self) -> None:
        """Drop steps that were not flushed: they will be done again."""
        self._pending.clear()

    def flush(self, extras: list[str]) -> list[StepRecord]:
        """Records of the steps added since the last flush, equal on every rank. A collective.

        Raises:
            UsageError: a rank holds other weights, or stands at another step (see StateFingerprint.compare).
        """
        if not self._pending:
            return []
        plans = [plan for plan, _, _ in self._pending]
        rows, times, memory = self._gather(plans[-1], 2 + len(extras))
        seconds = times[:, :, : len(PHASES)]
        self.slow_rank = self._stragglers.add(seconds)
        sums = self._sums(plans, rows).tolist()
        mean, most = seconds.mean(0).round(_DIGITS).tolist(), seconds.max(0).round(_DIGITS).tolist()
        slowest = seconds.argmax(0).tolist()
        walls = times.sum(2).max(0).tolist()  # before rounding, so that nothing is lost over a run
        records = []
        for index, plan in enumerate(plans):
            total, weight, *more = sums[index]
            averages = [value / weight if weight else float("nan") for value in (total, *more)]
            spreads = zip(PHASES, mean[index], most[index], slowest[index], strict=True)
            records.append(
                StepRecord(
                    step=plan.step + 1,
                    epoch=plan.epoch,
                    loss=averages[0],
                    samples=plan.samples,
                    seconds={name: {"mean": m, "max": x, "slowest_rank": r} for name, m, x, r in spreads},
                    wall_seconds=walls[index],
                    extra=dict(zip(extras, averages[1:], strict=True)),
                )
            )
            if not math.isfinite(total):
                total, weight = 0.0, 0.0  # such a step was left out
            self.epoch.add(total, weight, plan.samples, walls[index])
        self._pending.clear()
        records[-1] = replace(records[-1], loads=_loads(times, memory))
        return records

    def _gather(self, last: StepPlan, columns: int) -> tuple[Table, Table, Table]:
        """Rows (world_size, steps, width, columns), times (world_size, steps, phases), bytes (world_size, KINDS).

        Of all ranks, on the host; phases are PHASES and BETWEEN.
        """
        rows = self._rows(columns)
        seconds = torch.tensor([reading() for _, _, reading in self._pending], dtype=torch.float64, device=self.device)
        mark = self.fingerprint.row(last.step + 1, last.end).view(torch.float64)  # carried as bits, never computed with
        known_to_all = rows.dim() == 4  # (steps, world_size, width, columns): gathered in each step
        memory = torch.tensor(peak_memory(self.device), dtype=torch.float64, device=self.device)
        parts = [mark, memory, seconds.flatten()] + ([] if known_to_all else [rows.flatten()])
        gathered = self.group.gather(torch.cat(parts))
        self.fingerprint.compare(gathered[:, : len(mark)].contiguous().view(torch.int64), last.step + 1)
        bytes_held, table = np.split(gathered[:, len(mark) :].cpu().numpy(), [len(KINDS)], axis=1)
        times = table[:, : seconds.numel()].reshape(-1, *seconds.shape)
        if known_to_all:
            return rows.transpose(0, 1).cpu().numpy(), times, bytes_held
        return table[:, seconds.numel() :].reshape(-1, *rows.shape), times, bytes_held

    def _rows(self, columns: int) -> Tensor:
        """(steps, width, columns) of this rank, or of all ranks with world_size after steps."""
        gathered = [rows for _, rows, _ in self._pending if isinstance(rows, Tensor)]
        if gathered:
            return torch.stack(gathered)
        spans = [owned_span(rank, self.group.world_size, self.shards) for rank in range(self.group.world_size)]
        mine = [rows for _, rows, _ in self._pending if isinstance(rows, list)]
        return table(mine, max(hi - lo for lo, hi in spans), columns, self.device)

    def _sums(self, plans: list[StepPlan], rows: Table) -> Table:
        """Rows summed over the shards along the tree, for all steps with equally many shards at once."""
        world_size = len(rows)
        present = np.array([min(plan.samples, self.shards) for plan in plans])
        sums = np.empty((len(plans), rows.shape[-1]))
        for count in np.unique(present).tolist():
            steps = np.flatnonzero(present == count)
            leaves = {}
            for rank in range(world_size):
                lo, hi = owned_span(rank, world_size, self.shards)
                for shard in range(lo, min(hi, count)):
                    leaves[shard, shard + 1] = rows[rank, steps, shard - lo]
            sums[steps] = tree_sum((0, self.shards), leaves, np.add)
        return sums


def _loads(seconds: Table, memory: Table) -> RankLoads:
    """Times (world_size, steps, PHASES and BETWEEN) and bytes (world_size, KINDS) as they are reported."""
    of_ranks = seconds.mean(1).T.tolist()
    return RankLoads(
        seconds=dict(zip((*PHASES, BETWEEN), of_ranks, strict=True)),
        memory={kind: [int(held) for held in column] for kind, column in zip(KINDS, memory.T.tolist(), strict=True)},
    )


def phase_line(records: list[StepRecord]) -> str:
    """Where the time of some steps went on average, and which rank spent most of it, in one line."""
    means = {phase: sum(record.seconds[phase]["mean"] for record in records) for phase in PHASES}
    whole = sum(means.values()) or 1.0
    shares = ", ".join(f"{phase} {100 * seconds / whole:.0f}%" for phase, seconds in means.items())
    phase = max(PHASES, key=lambda name: sum(r.seconds[name]["max"] - r.seconds[name]["mean"] for r in records))
    ranks = [record.seconds[phase]["slowest_rank"] for record in records]
    return f"{shares}; slowest in {phase}: rank {max(set(ranks), key=ranks.count)}"
