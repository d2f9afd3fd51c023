"""One step of a loop of one's own, as the user's lines see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from samestep.train.data.rng import seed_of_pass, seed_shard
from samestep.train.parallel.shards import Span, StepPlan


class Step:
    """One global batch, of which this rank has the batches of its shards.

    Attributes:
        plan: which positions of the epoch's order it takes.
    """

    def __init__(self, plan: StepPlan, batches: Iterator[Any], owned: Span) -> None:
        self.plan = plan
        self._batches = batches
        self._count = len(plan.present(owned))
        self._taken: list[Any] = []
        self._passes = 0

    @property
    def number(self) -> int:
        """Counted from 1 over the whole run, the same after a restart."""
        return self.plan.step + 1

    @property
    def epoch(self) -> int:
        """Counted from 1."""
        return self.plan.epoch + 1

    @property
    def samples(self) -> int:
        """In the global batch."""
        return self.plan.samples

    def begin_pass(self) -> int:
        """How many passes over this step began before: a key of their random numbers."""
        self._passes += 1
        return self._passes - 1

    def seed_between(self, seed: int) -> None:
        """Seed what is drawn outside of passes: alike on all ranks, though each went through other shards."""
        seed_shard(seed_of_pass(seed, self._passes), self.plan.step, self.plan.shards)

    def batch(self, number: int) -> Any:
        """That of one of this rank's shards; it is kept for further passes until the step is over."""
        while len(self._taken) <= number:
            self._taken.append(next(self._batches))
        return self._taken[number]

    def finish(self) -> None:
        """Take what nobody asked for: the batches after it are the next step's."""
        if self._count:
            self.batch(self._count - 1)
        self._taken.clear()
