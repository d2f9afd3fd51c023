"""Finished steps between two log intervals, and the running average of the epoch.

Losses stay on the device until `flush`, which reads them all at once and exchanges the ranks' phase times in one
gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samestep.train.observe.memory import KINDS, peak_memory
from samestep.train.observe.phases import BETWEEN, PHASES, WAITING, Reading
from samestep.train.observe.stragglers import Straggler, StragglerWatch
from samestep.train.observe.tally import Values, table
from samestep.train.parallel.fingerprint import StateFingerprint
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import StepPlan, owned_span, tree_sum
from samestep.train.recipe import unusable_weight

Table = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RankLoads:
    """Each rank by itself: mean seconds of PHASES and BETWEEN since the last flush, peak bytes since its start."""

    seconds: dict[str, list[float]]
    memory: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class StepRecords:
    """Finished steps as they are reported, a row a step; equal on every rank.

    Attributes:
        plans: which steps they are.
        losses: the objective, NaN where a step had no weight.
        weightless: whether it had none.
        extras: further averages that the loss logs, by name.
        mean, most, slowest: seconds over the ranks, and who took longest; shape (steps, PHASES).
        walls: seconds of the rank that took longest, with the time since the step before.
        loads: of each rank by itself.
    """

    plans: list[StepPlan]
    losses: list[float]
    weightless: list[bool]
    extras: dict[str, list[float]]
    mean: Table
    most: Table
    slowest: Table
    walls: list[float]
    loads: RankLoads

    def __len__(self) -> int:
        return len(self.plans)

    def due(self, every: int, samples: int, global_batch_size: int) -> Iterator[int]:
        """Rows of the steps after which something is shown, each `every` steps of an epoch of `samples`."""
        return (row for row in range(len(self)) if self.position(row, samples, global_batch_size) % every == 0)

    def position(self, row: int, samples: int, global_batch_size: int) -> int:
        """Steps done in the epoch after that of `row`: those there are of this size, without those that are left.

        So each has a number of its own and the last one is the last, also where the first ones had another size.
        """
        return -(-samples // global_batch_size) + (self.plans[row].end - samples) // global_batch_size

    def logged(self, row: int) -> dict[str, float]:
        """Further averages of one step."""
        return {name: values[row] for name, values in self.extras.items()}

    def samples_per_second(self, row: int) -> float:
        """Of all ranks; 0 where no time has passed."""
        return self.plans[row].samples / self.walls[row] if self.walls[row] else 0.0


@dataclass(slots=True)
class EpochSums:
    """What the epoch's average loss is made of; part of the state, since an epoch may be resumed."""

    total: float = 0.0
    weight: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def add(self, totals: list[float], weights: list[float], plans: list[StepPlan], walls: list[float]) -> None:
        """Take steps one after another; one whose total is not finite was left out."""
        for total, weight, plan, seconds in zip(totals, weights, plans, walls, strict=True):
            if math.isfinite(total):
                self.total, self.weight = self.total + total, self.weight + weight
            self.samples, self.seconds = self.samples + plan.samples, self.seconds + seconds

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
    _pending: list[tuple[StepPlan, Values, Reading]] = field(default_factory=list)

    def __post_init__(self) -> None:
        spans = [owned_span(rank, self.group.world_size, self.shards) for rank in range(self.group.world_size)]
        self._stragglers = StragglerWatch([hi - lo for lo, hi in spans])

    def add(self, plan: StepPlan, rows: Values, reading: Reading) -> None:
        """Take a finished step: this rank's rows (see StepTally), still on the device."""
        self._pending.append((plan, rows, reading))

    def forget(self) -> None:
        """Drop steps that were not flushed: they will be done again."""
        self._pending.clear()

    def flush(self, extras: list[str]) -> StepRecords | None:
        """The steps added since the last flush, or None where there are none. A collective.

        Raises:
            UsageError: a rank holds other weights, or stands at another step (see StateFingerprint.compare); a loss
                weighs what the mean can't divide by.
        """
        if not self._pending:
            return None
        plans = [plan for plan, _, _ in self._pending]
        rows, times, memory = self._gather(plans[-1], 2 + len(extras))
        _require_usable(plans, rows[..., 1])
        seconds = times[:, :, : len(PHASES)]
        self.slow_rank = self._stragglers.add(seconds)
        totals, weights, *more = self._sums(plans, rows).T
        with np.errstate(divide="ignore", invalid="ignore"):
            losses, *averages = (
                np.where(weights != 0, values / weights, np.nan).tolist() for values in (totals, *more)
            )
        walls = times.sum(2).max(0).tolist()
        self.epoch.add(totals.tolist(), weights.tolist(), plans, walls)
        self._pending.clear()
        return StepRecords(
            plans=plans,
            losses=losses,
            weightless=(weights == 0).tolist(),
            extras=dict(zip(extras, averages, strict=True)),
            mean=seconds.mean(0),
            most=seconds.max(0),
            slowest=seconds.argmax(0),
            walls=walls,
            loads=_loads(times, memory),
        )

    def _gather(self, last: StepPlan, columns: int) -> tuple[Table, Table, Table]:
        """Rows (world_size, steps, width, columns), times (world_size, steps, phases), bytes (world_size, KINDS).

        Of all ranks, on the host; phases are PHASES and BETWEEN.
        """
        rows = self._rows(columns)
        seconds = torch.from_numpy(np.array([reading() for _, _, reading in self._pending])).to(self.device)
        mark = self.fingerprint.row(last.step + 1, last.end).view(torch.float64)  # carried as bits, never computed with
        memory = torch.tensor(peak_memory(self.device), dtype=torch.float64, device=self.device)
        gathered = self.group.gather(torch.cat([mark, memory, seconds.flatten(), rows.flatten()]))
        self.fingerprint.compare(gathered[:, : len(mark)].contiguous().view(torch.int64), last.step + 1)
        bytes_held, table = np.split(gathered[:, len(mark) :].cpu().numpy(), [len(KINDS)], axis=1)
        times = table[:, : seconds.numel()].reshape(-1, *seconds.shape)
        return table[:, seconds.numel() :].reshape(-1, *rows.shape), times, bytes_held

    def _rows(self, columns: int) -> Tensor:
        """(steps, width, columns) of this rank."""
        spans = [owned_span(rank, self.group.world_size, self.shards) for rank in range(self.group.world_size)]
        return table([rows for _, rows, _ in self._pending], max(hi - lo for lo, hi in spans), columns, self.device)

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


def _require_usable(plans: list[StepPlan], weights: Table) -> None:
    """Judge weights (world_size, steps, width); NaN is left to `--nan-policy`, since so are then all gradients."""
    wrong = (weights < 0) | np.isinf(weights)
    if wrong.any():
        first = int(wrong.any((0, 2)).argmax())
        raise unusable_weight(float(weights[:, first][wrong[:, first]][0]), f"loss in step {plans[first].step + 1}")


def _loads(seconds: Table, memory: Table) -> RankLoads:
    """Times (world_size, steps, PHASES and BETWEEN) and bytes (world_size, KINDS) as they are reported."""
    of_ranks = seconds.mean(1).T.tolist()
    return RankLoads(
        seconds=dict(zip((*PHASES, BETWEEN), of_ranks, strict=True)),
        memory={kind: [int(held) for held in column] for kind, column in zip(KINDS, memory.T.tolist(), strict=True)},
    )


def phase_line(several: list[StepRecords]) -> str:
    """Where the time of some steps went on average, and which rank the others waited for most, in one line."""
    mean, most, slowest = (np.concatenate([getattr(r, name) for r in several]) for name in ("mean", "most", "slowest"))
    between = sum(len(r) * float(np.mean(r.loads.seconds[BETWEEN])) for r in several)
    parts = {**dict(zip(PHASES, mean.sum(0).tolist(), strict=True)), "between steps": between}
    whole = sum(parts.values()) or 1.0
    shares = ", ".join(f"{name} {100 * part / whole:.0f}%" for name, part in parts.items())
    if len(several[0].loads.seconds[BETWEEN]) < 2:
        return shares
    late = (most - mean).sum(0)
    late[PHASES.index(WAITING)] = -1.0
    phase = int(late.argmax())
    return f"{shares}; slowest in {PHASES[phase]}: rank {np.bincount(slowest[:, phase]).argmax()}"
