"""How a global batch is cut into logical shards, who owns them, and the one tree over which they are summed.

Everything here is a pure function of small integers. V shards are fixed for the life of a run; W ranks may change at
every start. A span `(lo, hi)` is the contiguous run of shards lo..hi-1. The tree over `(0, V)` splits every span at its
midpoint, so for W = 2^k ranks and V a multiple of W each rank owns exactly one complete subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

Span = tuple[int, int]
Value = TypeVar("Value")


def slice_of(lo: int, hi: int, part: int, parts: int) -> Span:
    """The `part`-th of `parts` near-equal contiguous slices of [lo, hi); the first ones get the remainder."""
    size, remainder = divmod(hi - lo, parts)
    begin = lo + part * size + min(part, remainder)
    return begin, begin + size + (part < remainder)


def owned_span(rank: int, world_size: int, shards: int) -> Span:
    """The shards that a rank runs. With more ranks than shards the surplus ranks get an empty span and idle."""
    return rank * shards // world_size, (rank + 1) * shards // world_size


def midpoint(span: Span) -> int:
    """Where the tree splits a span of two shards or more."""
    return (span[0] + span[1]) // 2


def roots(owned: Span, span: Span) -> list[Span]:
    """Largest complete subtrees of the tree over `span` that lie inside `owned`, from left to right."""
    if owned[0] <= span[0] and span[1] <= owned[1]:
        return [span]
    if span[1] <= owned[0] or owned[1] <= span[0]:
        return []
    middle = midpoint(span)
    return roots(owned, (span[0], middle)) + roots(owned, (middle, span[1]))


def tree_sum(span: Span, known: Mapping[Span, Value], add: Callable[[Value, Value], Value]) -> Value | None:
    """Sum along the tree from subtrees already summed; a leaf that is not known is an empty shard and adds nothing."""
    if span in known:
        return known[span]
    if span[1] - span[0] < 2:
        return None
    middle = midpoint(span)
    left, right = tree_sum((span[0], middle), known, add), tree_sum((middle, span[1]), known, add)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def smallest_shard(samples: int, global_batch_size: int, shards: int) -> int:
    """Size of the smallest shard that is not empty, over all steps of an epoch of `samples`."""
    batches = {min(global_batch_size, samples), samples % global_batch_size} - {0}
    return min(max(1, size // shards) for size in batches)


@dataclass(slots=True)
class Fold(Generic[Value]):
    """Sums leaves as they come, from left to right, keeping at most one partial sum a level of the tree.

    `span` is the subtree that is being summed and `add` a function of two values that alters neither.
    """

    span: Span
    add: Callable[[Value, Value], Value]
    partial: list[tuple[Span, Value | None]] = field(default_factory=list)

    def push(self, shard: int, value: Value | None) -> None:
        """Take the next leaf; None is an empty shard."""
        done: Span = (shard, shard + 1)
        while done != self.span:
            parent = self._parent(done)
            if done[0] == parent[0]:
                break
            _, left = self.partial.pop()
            value = value if left is None else left if value is None else self.add(left, value)
            done = parent
        self.partial.append((done, value))

    def pending(self, shard: int) -> list[Value]:  # noqa: ARG002 (says which leaf the sums are for)
        """Partial sums to which leaf `shard`, the last one of `span`, has to be added: innermost last."""
        return [value for _, value in self.partial if value is not None]

    @property
    def total(self) -> Value | None:
        """The sum, once the last leaf was pushed."""
        return self.partial[0][1] if self.partial else None

    def _parent(self, child: Span) -> Span:
        span = self.span
        while True:
            middle = midpoint(span)
            half = (span[0], middle) if child[0] < middle else (middle, span[1])
            if half == child:
                return span
            span = half


def gradient_copies(owned: Span, world_size: int, shards: int, parts: int) -> int:
    """Gradients of the whole model that the exact sum of a rank holds at most, in a step in which all ranks work.

    DDP's buckets count as one of them, and `p.grad` are views of those; what travels to other ranks does not count.
    `parts` are micro-batches of a shard.
    """
    if world_size == 1 and shards == 1:
        return 1
    buckets = int(world_size > 1)
    most = 1
    for done, span in enumerate(roots(owned, (0, shards))):  # so many subtrees are complete
        fold: Fold[int] = Fold(span, lambda left, right: left + right)
        for shard in range(*span):
            kept = buckets + done + len(fold.partial)
            in_buckets = buckets and shard == owned[1] - 1
            sum_of_parts = 0 if parts == 1 else 1 if parts == 2 and in_buckets else 3  # so far, new, and both
            most = max(most, kept + (sum_of_parts if in_buckets else sum_of_parts or 1))
            fold.push(shard, 1)
            combines = len(fold.partial) + buckets + done <= kept
            if combines and not in_buckets:
                most = max(most, kept + 2)  # left, right and their sum
    return most


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples [begin, end) of a shard, whose forward and backward run by themselves: all, unless memory is short."""

    shard: int
    begin: int
    end: int
    first: bool
    last: bool

    @property
    def samples(self) -> int:
        """How many."""
        return self.end - self.begin


class StepPlan(NamedTuple):  # made twice a step: in a third of a dataclass's time
    """One optimizer step as every rank can compute it: positions [begin, end) of an epoch, cut into `shards`."""

    step: int  # optimizer steps completed before this one
    epoch: int
    begin: int
    end: int
    shards: int
    micro_batches: int = 1  # parts of a shard that run one after the other; fewer where it has fewer samples

    @property
    def samples(self) -> int:
        """Samples in the global batch."""
        return self.end - self.begin

    def size(self, shard: int) -> int:
        """Samples of one shard; those of `slice_of`."""
        size, remainder = divmod(self.end - self.begin, self.shards)
        return size + (shard < remainder)

    def present(self, span: Span) -> list[int]:
        """The shards of `span` that are not empty: the first ones, where there are fewer samples than shards."""
        return list(range(span[0], min(span[1], self.end - self.begin)))

    def parts(self, shard: int) -> tuple[MicroBatch, ...]:
        """The near-equal micro-batches of a shard that is not empty, in their order."""
        return _parts(shard, self.size(shard), self.micro_batches)

    def everyone_works(self, world_size: int) -> bool:
        """Whether each rank has at least one sample."""
        return self.end - self.begin >= _samples_for_everyone(world_size, self.shards)


@lru_cache(maxsize=4096)
def _parts(shard: int, size: int, count: int) -> tuple[MicroBatch, ...]:
    count = min(count, size)
    cuts = [slice_of(0, size, part, count) for part in range(count)]
    return tuple(MicroBatch(shard, begin, end, begin == 0, end == size) for begin, end in cuts)


@lru_cache(maxsize=64)
def _samples_for_everyone(world_size: int, shards: int) -> float:
    """Samples that a batch needs for the first shard of every rank not to be empty."""
    spans = [owned_span(rank, world_size, shards) for rank in range(world_size)]
    return max(lo for lo, _ in spans) + 1 if all(lo < hi for lo, hi in spans) else float("inf")
