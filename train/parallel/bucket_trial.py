"""How large the buckets are in which gradients travel: some sizes take turns in the first steps, then the best stays.

Small buckets leave for the other ranks early in backward, large ones cost fewer messages; which counts for more depends
on the network and the model. No bit depends on it where sums are exact. All ranks know how long the slowest one took
for each step, so that all decide alike without another word.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SIZES_MB: tuple[float, ...] = (25.0, 5.0, 100.0)  # the first one is kept unless another is faster
STEPS, SETTLING, ROUNDS = 8, 3, 2  # that are timed in a turn, and before them; turns of each size
WORTH_IT = 0.97  # of the time with the first size


class Buckets(Protocol):
    """Told how long steps took."""

    def took(self, first: int, seconds: Sequence[float]) -> str:
        """Steps from number `first` on, of the rank that took longest; a sentence once something is decided."""


class FixedBuckets:
    """Where nothing is sent, where bits may depend on it, or where all gradients fit into the smallest one."""

    def took(self, first: int, seconds: Sequence[float]) -> str:  # noqa: ARG002 (Buckets' form)
        """Nothing is tried."""
        return ""


@dataclass(slots=True)
class BucketTrial:
    """Tries `sizes` in MB in turns and calls `resize` for the steps that follow, on all ranks after the same step."""

    sizes: Sequence[float]
    resize: Callable[[float], None]
    _turns: list[list[float]] = field(default_factory=lambda: [[]])  # seconds of the steps that count, a list a turn
    _expected: int | None = None  # number of the next step, if no step is done again
    _settling: int = SETTLING
    _decided: bool = False

    def took(self, first: int, seconds: Sequence[float]) -> str:
        """See Buckets."""
        if self._decided:
            return ""
        if first != self._expected:
            self._settling = SETTLING
        self._expected = first + len(seconds)
        counted = seconds[self._settling :]
        self._settling = max(0, self._settling - len(seconds))
        self._turns[-1] += counted
        return self._next_turn() if len(self._turns[-1]) >= STEPS else ""

    def _next_turn(self) -> str:
        if len(self._turns) < ROUNDS * len(self.sizes):
            self.resize(self.sizes[len(self._turns) % len(self.sizes)])
            self._turns.append([])
            self._settling = SETTLING
            return ""
        self._decided = True
        typical = [statistics.median(turn) for turn in self._turns]
        best, of_size = fastest(self.sizes, typical)
        self.resize(best)
        others = (f"{1000 * took:.3g} ms with {size:g} MB" for size, took in of_size.items() if size != best)
        return (
            f"gradients travel in buckets of {best:g} MB: a step takes {1000 * of_size[best]:.3g} ms, "
            f"{', '.join(others)}"
        )


def fastest(sizes: Sequence[float], turns: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The size to keep, and the seconds a step that each took in the better of its turns. Pure."""
    of_size: dict[float, float] = {}
    for size, took in zip(itertools.cycle(sizes), turns, strict=False):
        of_size[size] = min(took, of_size.get(size, took))
    best = min(of_size, key=lambda size: of_size[size])
    return (best if of_size[best] < WORTH_IT * of_size[sizes[0]] else sizes[0]), of_size


def bucket_trial(gradient_bytes: int, world_size: int, resize: Callable[[float], None], *, exact: bool) -> Buckets:
    """A trial of those sizes that cut the gradients differently, if there are two."""
    megabytes = gradient_bytes / 2**20  # as DDP counts
    whole = min((size for size in SIZES_MB if size >= megabytes), default=None)
    sizes = [size for size in SIZES_MB if size < megabytes or size == whole]
    if world_size == 1 or not exact or len(sizes) < 2:
        return FixedBuckets()
    return BucketTrial(sizes, resize)
