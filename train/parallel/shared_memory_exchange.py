"""The exchange of ranks on one host: each writes its partial sums where all can read them, and adds up by itself.

Sums follow the same tree as those of TreeExchange, so the bits are the same. Whatever was started before the first
total is asked for is settled in one meeting, however many buckets that are, as far as there is room. A rank's memory
has two halves, used in turns: once all have met about the second one, everybody has read the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samestep.train.parallel.exchange import Exchange, Flight, present_roots
from samestep.train.parallel.shards import Span, midpoint, slice_of, tree_sum
from samestep.train.parallel.shared_memory import Arena

_ALIGNED = 64  # bytes
_SMALL = 1 << 17  # bytes up to which each rank adds up all of it: a second meeting would take longer
_MOST_LAYOUTS = 1024

ByRank = tuple[tuple[Span, ...], ...]


@dataclass(slots=True, eq=False)
class _Landing:
    """One flat tensor on its way: first as `mine`, then as `roots` of all ranks, of each the `first` in its memory."""

    exchange: ArenaExchange
    mine: list[Tensor]
    total: Tensor
    by_rank: ByRank
    roots: dict[Span, Tensor] = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)
    settled: bool = False

    @property
    def stride(self) -> int:
        """Bytes from one root to the next."""
        return -(-self.total.numel() * self.total.element_size() // _ALIGNED) * _ALIGNED

    @property
    def room(self) -> int:
        """Bytes that it takes of each rank's memory."""
        return max(map(len, self.by_rank)) * self.stride

    def advance(self) -> None:
        """Nothing moves before the total is asked for."""

    def finish(self) -> Tensor:
        """See Flight."""
        while not self.settled:
            self.exchange.settle()
        return self.total


@dataclass(slots=True)
class ArenaExchange:
    """The fixed tree over `shards`; a tensor that is larger than half an arena goes `otherwise`."""

    arena: Arena
    world_size: int
    shards: int
    otherwise: Exchange
    through: str = "shared memory"
    _waiting: deque[_Landing] = field(default_factory=deque)  # for room
    _written: list[_Landing] = field(default_factory=list)
    _half: int = 0
    _used: int = 0  # bytes of that half
    _layouts: dict[object, tuple[dict[Span, Tensor], list[Tensor]]] = field(default_factory=dict)

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:
        """Write this rank's roots; the total will lie in `like`, which may be one of them."""
        landing = _Landing(self, mine, like, present_roots(self.world_size, self.shards, present))
        if landing.room > self.arena.size // 2:
            return self.otherwise.start(mine, like, present)
        self._waiting.append(landing)
        self._write()
        return landing

    def settle(self) -> None:
        """Find the totals of all that was written. A collective."""
        self.arena.meet(*[landing.total.numel() for landing in self._written], self._used)
        in_slices = [landing for landing in self._written if self.world_size > 2 and landing.stride > _SMALL]
        for landing in self._written:
            if landing in in_slices:
                self._add_own_slice(landing)
            else:
                _add_up((0, self.shards), landing.roots, landing.total)
            landing.settled = True
        if in_slices:
            self.arena.meet(len(in_slices))
        for landing in in_slices:
            for rank, part in enumerate(landing.first):
                lo, hi = self._slice(landing, rank)
                landing.total[lo:hi].copy_(part[lo:hi])
        self._half, self._used, self._written = 1 - self._half, 0, []
        self._write()

    def _write(self) -> None:
        """As many as there is room for, in the order in which they were started."""
        half = self.arena.size // 2
        while self._waiting and self._used + self._waiting[0].room <= half:
            landing = self._waiting.popleft()
            roots, landing.first = self._layout(landing, self._half * half + self._used)
            own = dict(zip(landing.by_rank[self.arena.rank], landing.mine, strict=True))
            for span, root in own.items():
                roots[span].copy_(root)
            landing.roots = roots | own
            self._used += landing.room
            self._written.append(landing)

    def _add_own_slice(self, landing: _Landing) -> None:
        """Into this rank's memory, of which nobody else reads that slice before the next meeting."""
        rank = self.arena.rank
        lo, hi = self._slice(landing, rank)
        parts = {span: root[lo:hi] for span, root in landing.roots.items()}
        _add_up((0, self.shards), parts, landing.first[rank][lo:hi])

    def _slice(self, landing: _Landing, rank: int) -> Span:
        return slice_of(0, landing.total.numel(), rank, self.world_size)

    def _layout(self, landing: _Landing, begin: int) -> tuple[dict[Span, Tensor], list[Tensor]]:
        """All ranks' roots from byte `begin` on, as tensors like the total; of each rank at least one."""
        total = landing.total
        key = (landing.by_rank, begin, total.numel(), total.dtype)
        if key not in self._layouts:
            if len(self._layouts) == _MOST_LAYOUTS:
                self._layouts.clear()
            size = total.numel() * total.element_size()
            roots: dict[Span, Tensor] = {}
            first = []
            for memory, spans in zip(self.arena.memory, landing.by_rank, strict=True):
                places = [begin + number * landing.stride for number in range(max(1, len(spans)))]
                views = [memory[place : place + size].view(total.dtype) for place in places]
                first.append(views[0])
                roots.update(zip(spans, views, strict=False))
            self._layouts[key] = roots, first
        return self._layouts[key]


def _add_up(span: Span, known: Mapping[Span, Tensor], total: Tensor) -> None:
    """`tree_sum` into `total`, which may be one of the `known`."""
    if span in known:
        total.copy_(known[span])
        return
    middle = midpoint(span)
    left, right = tree_sum((span[0], middle), known, torch.add), tree_sum((middle, span[1]), known, torch.add)
    if left is not None and right is not None:
        torch.add(left, right, out=total)
    elif (only := right if left is None else left) is not None:
        total.copy_(only)
