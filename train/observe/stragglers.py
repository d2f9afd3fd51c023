"""Which rank keeps the others waiting, step after step: pure arithmetic on the phase times of all ranks.

A rank's own work is what it does in data, forward, backward and the optimizer's step; in sync it waits for others.
Ranks that run more shards may take as much longer, not for the optimizer's step. A rank is slow where it takes
clearly longer than the median of the others in nearly every step, and the step gets noticeably longer by it: chance,
samples of different length and a busy moment do not look like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from samestep.train.observe.phases import PHASES

Table = npt.NDArray[np.float64]

OWN_WORK = ("data", "forward", "backward", "optimizer")
LEAST_STEPS, LEAST_SECONDS = 20, 2.0  # that are looked at together
LONGER = 1.25  # than the others' median, at least
NEARLY_ALWAYS = 0.8  # of the steps
NOTICEABLE = 0.1  # of a step's duration
AGAIN_SECONDS = 600.0  # of training, until the same rank is named once more


@dataclass(frozen=True, slots=True)
class Straggler:
    """A slow rank; seconds a step, medians over the steps looked at, or what else is said in `each`."""

    rank: int
    phase: str
    seconds: float
    others: float
    each: str = "a step"

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow in {self.phase}: {_duration(self.seconds)} {self.each} where others take "
            f"{_duration(self.others)}; they wait for it"
        )


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def slowest(seconds: Table, shards: Sequence[int]) -> Straggler | None:
    """The rank that costs most, if one is slow.

    Args:
        seconds: shape (world_size, steps, len(PHASES)).
        shards: how many each rank runs a step; ranks without any are left out.
    """
    ranks = [rank for rank, count in enumerate(shards) if count]
    if len(ranks) < 2:
        return None
    step = float(np.median(seconds.sum(2).max(0)))
    found: list[tuple[float, Straggler]] = []
    for phase in OWN_WORK:
        load = np.array([1 if phase == "optimizer" else shards[rank] for rank in ranks], dtype=np.float64)
        a_shard = seconds[ranks, :, PHASES.index(phase)] / load[:, None]
        for row, rank in enumerate(ranks):
            others = np.median(np.delete(a_shard, row, axis=0), axis=0)
            lost = float(np.median(a_shard[row] - others)) * load[row]
            often = float(np.mean(a_shard[row] > LONGER * others))
            if often >= NEARLY_ALWAYS and lost > NOTICEABLE * step:
                mine, theirs = float(np.median(a_shard[row])), float(np.median(others))
                found.append((lost, Straggler(rank, phase, mine * load[row], theirs * load[row])))
    return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclass(slots=True)
class StragglerWatch:
    """Collects the steps of all ranks and names a slow one, once in a while."""

    shards: Sequence[int]
    _tables: list[Table] = field(default_factory=list)
    _steps: int = 0
    _duration: float = 0.0  # seconds that these steps took
    _trained: float = 0.0  # seconds
    _named: dict[tuple[int, str], float] = field(default_factory=dict)

    def add(self, seconds: Table) -> Straggler | None:
        """Take the times of some steps, shape (world_size, steps, len(PHASES)); equal arguments, equal answers."""
        self._tables.append(seconds)
        self._steps += seconds.shape[1]
        self._duration += float(seconds.sum(2).max(0).sum())
        if self._steps < LEAST_STEPS or self._duration < LEAST_SECONDS:
            return None
        table = np.concatenate(self._tables, axis=1)
        self._trained += self._duration
        self._tables, self._steps, self._duration = [], 0, 0.0
        slow = slowest(table, self.shards)
        if slow is None or self._trained < self._named.get((slow.rank, slow.phase), 0.0):
            return None
        self._named[slow.rank, slow.phase] = self._trained + AGAIN_SECONDS
        return slow
