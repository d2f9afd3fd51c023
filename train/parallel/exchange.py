"""How the ranks' partial sums of one flat tensor become the same total on every rank.

`TreeExchange` finishes the one tree over the shards, so the bits do not depend on the number of ranks: roots of owned
subtrees travel in slices (all_to_all), the owner of a slice finishes the tree on it, all_gather brings the slices
together; for one root a rank these are as many bytes as a ring all_reduce moves. `BackendExchange` is the backend's own
all_reduce: same order of samples and same weights, but bits only at the same world size.

An exchange has three steps, so that several can be in flight: `start`, `advance` (once the first collective is
through), `finish`. All ranks issue them in the same order, from the thread that runs backward. Never from a completion
callback: blocking there deadlocks, and asynchronous chaining there gave silently wrong sums on gloo.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from samestep.train.parallel.group import all_gather
from samestep.train.parallel.shards import Span, owned_span, roots, tree_sum


@lru_cache(maxsize=64)
def present_roots(world_size: int, shards: int, present: int) -> tuple[tuple[Span, ...], ...]:
    """For each rank the roots it contributes when shards `present`.. are empty."""
    everything = [roots(owned_span(rank, world_size, shards), (0, shards)) for rank in range(world_size)]
    return tuple(tuple(span for span in owned if span[0] < present) for owned in everything)


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Work beside the current stream; torch.cuda.stream(None) would start CUDA on ranks that compute on a CPU."""
    return contextlib.nullcontext() if stream is None else stream


class Flight(Protocol):
    """One flat tensor on its way."""

    def advance(self) -> None:
        """Wait for the first collective and start the second, if there is one."""

    def finish(self) -> Tensor:
        """Wait for the total, shape (numel,)."""


class Exchange(Protocol):
    """Starts flights; `present` is the number of shards that are not empty in this step.

    Attributes:
        through: what carries them, for people.
    """

    @property
    def through(self) -> str:
        """See the class."""

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:
        """Send this rank's present roots, flat tensors of one shape; `like` gives the shape where there are none."""


@dataclass(slots=True)
class _AllReduceFlight:
    flat: Tensor
    work: dist.Work | None

    def advance(self) -> None:
        """There is no second collective."""

    def finish(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.flat


@dataclass(slots=True)
class _TreeFlight:
    like: Tensor
    cut: int
    spans: list[Span]
    shards: int
    received: Tensor  # (number of roots of all ranks, size of this rank's slice)
    work: dist.Work
    world_size: int
    sent: Tensor  # not to be freed before the first collective is through
    aside: torch.cuda.Stream | None
    total: Tensor | None = field(default=None)

    def advance(self) -> None:
        if self.total is not None:
            return
        with _on(self.aside):
            self.work.wait()
            known = dict(zip(self.spans, self.received.unbind(0), strict=True))
            part = tree_sum((0, self.shards), known, torch.add)
            assert part is not None
            if part.numel() < self.cut:
                part = F.pad(part, (0, self.cut - part.numel()))
            self.total = part.new_empty(self.world_size * self.cut)
            self.work = all_gather(self.total, part, async_op=True)

    def finish(self) -> Tensor:
        self.advance()
        assert self.total is not None
        with _on(self.aside):
            self.work.wait()  # what was allocated beside is used again beside
        if self.aside is not None:
            torch.cuda.current_stream(self.aside.device).wait_stream(self.aside)
        return self.total[: self.like.numel()]


@dataclass(frozen=True, slots=True)
class TreeExchange:
    """The fixed tree over `shards`.

    Attributes:
        aside: on a GPU the stream on which slices are added up: it waits for the other ranks, and backward does not.
    """

    rank: int
    world_size: int
    shards: int
    aside: torch.cuda.Stream | None = None
    through: str = "the process group"

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:
        """Send the roots; with two ranks and one root each a plain all_reduce has the tree's bits."""
        by_rank = present_roots(self.world_size, self.shards, present)
        if self.world_size == 1:
            total = tree_sum((0, self.shards), dict(zip(by_rank[0], mine, strict=True)), torch.add)
            return _AllReduceFlight(like if total is None else total, None)
        if self.world_size == 2 and len(by_rank[0]) == len(by_rank[1]) == 1:
            return _AllReduceFlight(mine[0], dist.all_reduce(mine[0], async_op=True))
        numel, world = like.numel(), self.world_size
        cut = -(-numel // world)  # every slice but the last ones has this size
        sizes = [max(0, min(cut, numel - rank * cut)) for rank in range(world)]
        if len(mine) == 1:
            sent = mine[0]
        else:  # for each receiver its slice of all roots, one after the other
            parts = [root.split(sizes) for root in mine]
            sent = torch.cat([part[rank] for rank in range(world) for part in parts]) if parts else like.new_empty(0)
        spans = [span for owned in by_rank for span in owned]
        received = like.new_empty(len(spans) * sizes[self.rank])
        work = dist.all_to_all_single(
            received,
            sent,
            [len(owned) * sizes[self.rank] for owned in by_rank],
            [len(mine) * size for size in sizes],
            async_op=True,
        )
        return _TreeFlight(
            like, cut, spans, self.shards, received.view(len(spans), sizes[self.rank]), work, world, sent, self.aside
        )


@dataclass(frozen=True, slots=True)
class BackendExchange:
    """The backend's all_reduce of each rank's own sum."""

    rank: int
    world_size: int
    shards: int
    through: str = "the backend's all_reduce"

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:  # noqa: ARG002 (Exchange's form)
        """Add this rank's roots and all_reduce the sum."""
        flat = torch.zeros_like(like) if not mine else mine[0]
        for root in mine[1:]:
            flat = flat + root
        return _AllReduceFlight(flat, dist.all_reduce(flat, async_op=True) if self.world_size > 1 else None)
