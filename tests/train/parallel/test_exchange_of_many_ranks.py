"""The exchange of many ranks in one process: what one rank sends is put into the other's buffers, bit for bit.

The collectives only note their buffers; once all ranks have started, the slices are delivered, as a network would.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from samestep.train.parallel import exchange as under_test
from samestep.train.parallel.exchange import TreeExchange
from samestep.train.parallel.shards import owned_span, roots, tree_sum


class PostOffice:
    """Stands for torch.distributed and for the group's all_gather."""

    def __init__(self) -> None:
        self.slices: list[tuple[Tensor, Tensor, list[int], list[int]]] = []
        self.gathered: list[tuple[Tensor, Tensor]] = []
        self.work = SimpleNamespace(wait=lambda: None)

    def all_to_all_single(self, received, sent, received_sizes, sent_sizes, *, async_op):
        self.slices.append((received, sent, received_sizes, sent_sizes))
        return self.work

    def all_gather(self, total, part, *, async_op):
        self.gathered.append((total, part))
        return self.work

    def deliver_slices(self) -> None:
        incoming: list[list[Tensor]] = [[] for _ in self.slices]
        for _, sent, _, sizes in self.slices:
            for receiver, part in enumerate(sent.split(sizes)):
                incoming[receiver].append(part)
        for (received, _, sizes, _), parts in zip(self.slices, incoming, strict=True):
            assert [part.numel() for part in parts] == sizes
            received.copy_(torch.cat(parts))

    def deliver_totals(self) -> None:
        everything = torch.cat([part for _, part in self.gathered])
        for total, _ in self.gathered:
            total.copy_(everything)


@pytest.fixture
def post(monkeypatch) -> PostOffice:
    office = PostOffice()
    monkeypatch.setattr(under_test, "dist", office)
    monkeypatch.setattr(under_test, "all_gather", office.all_gather)
    return office


MANY = [(3, 3), (5, 8), (48, 64), (64, 64), (7, 5)]
VERY_MANY = [pytest.param(ranks, shards, marks=pytest.mark.slow) for ranks, shards in [(1024, 1024), (300, 1024)]]


@pytest.mark.parametrize(("ranks", "shards"), [*MANY, *VERY_MANY])
def test_every_rank_gets_the_bits_of_the_one_tree(ranks, shards, post):
    generator = torch.Generator().manual_seed(ranks)
    gradients = [torch.randn(1500, generator=generator) * 10.0 ** (shard % 9) for shard in range(shards)]
    whole = {(shard, shard + 1): gradient for shard, gradient in enumerate(gradients)}
    expected = tree_sum((0, shards), whole, torch.add)
    assert expected is not None
    flights = []
    for rank in range(ranks):
        owned = roots(owned_span(rank, ranks, shards), (0, shards))
        mine = [tree_sum(span, whole, torch.add) for span in owned]
        flights.append(TreeExchange(rank, ranks, shards).start(mine, gradients[0], shards))  # type: ignore[arg-type]
    post.deliver_slices()
    for flight in flights:
        flight.advance()
    post.deliver_totals()
    assert all(torch.equal(flight.finish(), expected) for flight in flights)
