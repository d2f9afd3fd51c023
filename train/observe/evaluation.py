"""What an evaluation gave, what each rank took for it, and which rank keeps the others waiting in evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from samestep.train.observe.stragglers import LONGER, NOTICEABLE, Straggler

LEAST_SECONDS = 1.0  # that the others wait
_PHASE = "evaluation"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One pass over the evaluation data.

    Attributes:
        metrics: by name, equal on every rank.
        samples: of all ranks.
        seconds: of the whole, with the wait for the slowest rank.
        rank_seconds: own work of each rank, before it waits for others.
        slow_rank: named now, and seldom again.
    """

    metrics: dict[str, float]
    samples: int
    seconds: float
    rank_seconds: list[float]
    slow_rank: Straggler | None = None


def slowest(seconds: Sequence[float], shards: Sequence[int]) -> Straggler | None:
    """The rank that took clearly longer a shard than the median of the others and kept them waiting by it, if any.

    Args:
        seconds: own work of each rank.
        shards: how many batches each rank went through; ranks without any are left out.
    """
    ranks = [rank for rank, count in enumerate(shards) if count]
    found: list[tuple[float, Straggler]] = []
    for rank in ranks if len(ranks) > 1 else ():
        mine = seconds[rank] / shards[rank]
        others = float(np.median([seconds[other] / shards[other] for other in ranks if other != rank]))
        lost = (mine - others) * shards[rank]
        if mine > LONGER * others and lost > max(LEAST_SECONDS, NOTICEABLE * max(seconds)):
            usual = others * shards[rank]
            found.append((lost, Straggler(rank, _PHASE, seconds[rank], usual, "an evaluation")))
    return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclass(slots=True)
class EvaluationWatch:
    """Names a rank that was the slow one twice in a row: once may be a busy moment."""

    _last: int | None = None
    _named: set[int] = field(default_factory=set)

    def add(self, seconds: Sequence[float], shards: Sequence[int]) -> Straggler | None:
        """Take one evaluation (see `slowest`); equal arguments, equal answers."""
        slow = slowest(seconds, shards)
        before, self._last = self._last, None if slow is None else slow.rank
        if slow is None or slow.rank != before or slow.rank in self._named:
            return None
        self._named.add(slow.rank)
        return slow
