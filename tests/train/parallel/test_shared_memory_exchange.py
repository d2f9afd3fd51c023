"""Sums in shared memory: the bits of the one tree, whatever the sizes, the room and the speed of the ranks."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

from samestep.train.parallel import shared_memory_exchange as under_test
from samestep.train.parallel.exchange import Flight, present_roots
from samestep.train.parallel.shards import tree_sum
from samestep.train.parallel.shared_memory import Arena
from samestep.train.parallel.shared_memory_exchange import ArenaExchange
from tests.train.parallel.thread_ranks import together

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared on Linux only")


class Refusing:
    """What does not fit goes elsewhere; here, nothing should."""

    through = "nothing"

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:
        raise AssertionError(f"{like.numel()} numbers of {present} shards went elsewhere")


def gradients(shards: int, numel: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of each shard; adding them in another order gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(numel, generator=generator) * 10.0 ** (shard % 7)).to(dtype) for shard in range(shards)]


def roots_of(rank: int, ranks: int, shards: int, leaves: list[Tensor], present: int) -> list[Tensor]:
    known = {(shard, shard + 1): leaf for shard, leaf in enumerate(leaves[:present])}
    sums = [tree_sum(span, known, torch.add) for span in present_roots(ranks, shards, present)[rank]]
    return [root.clone() for root in sums if root is not None]


def total_of(shards: int, leaves: list[Tensor], present: int) -> Tensor:
    total = tree_sum((0, shards), {(shard, shard + 1): leaf for shard, leaf in enumerate(leaves[:present])}, torch.add)
    assert total is not None
    return total


WORLDS = [(2, 2), (2, 3), (2, 8), (3, 3), (3, 8), (4, 4), (4, 7), (5, 8), (5, 3)]


@pytest.mark.parametrize("numel", [1, 1000, 40_000])
@pytest.mark.parametrize(("ranks", "shards"), WORLDS)
def test_every_rank_gets_the_bits_of_the_one_tree(ranks, shards, numel, arenas):
    """Also in steps that have too few samples for some shards, and with 40 000 numbers in slices."""
    steps = [(step, shards if step % 2 else max(1, shards - step)) for step in range(6)]
    leaves = {step: gradients(shards, numel, step) for step, _ in steps}

    def train(arena: Arena) -> list[Tensor]:
        exchange = ArenaExchange(arena, ranks, shards, Refusing())
        totals = []
        for step, present in steps:
            mine = roots_of(arena.rank, ranks, shards, leaves[step], present)
            like = mine[0] if mine else torch.empty(numel)
            totals.append(exchange.start(mine, like, present).finish().clone())
        return totals

    expected = [total_of(shards, leaves[step], present) for step, present in steps]
    for totals in together(arenas(ranks, size=1 << 21), train):
        assert all(torch.equal(mine, right) for mine, right in zip(totals, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_other_types_are_added_in_their_own_arithmetic(dtype, arenas):
    leaves = gradients(5, 33, 0, dtype)

    def add(arena: Arena) -> Tensor:
        mine = roots_of(arena.rank, 3, 5, leaves, 5)
        return ArenaExchange(arena, 3, 5, Refusing()).start(mine, mine[0], 5).finish()

    assert all(torch.equal(total, total_of(5, leaves, 5)) for total in together(arenas(3), add))


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (2, 5), (3, 3), (4, 6)])
def test_more_than_there_is_room_for_goes_in_turns(ranks, shards, arenas):
    """Twenty steps of buckets of all sizes, of which a half of the memory holds two or three; ranks at any speed."""
    sizes = [5, 60_000, 700, 50_000, 64_000, 1, 30_000]
    steps = range(20)
    leaves = {
        (step, number): gradients(shards, size, 100 * step + number)
        for step in steps
        for number, size in enumerate(sizes)
    }

    def train(arena: Arena) -> list[Tensor]:
        dice = random.Random(arena.rank)
        exchange = ArenaExchange(arena, ranks, shards, Refusing())
        totals = []
        for step in steps:
            flights: list[Flight] = []
            for number in range(len(sizes)):
                mine = roots_of(arena.rank, ranks, shards, leaves[step, number], shards)
                flights.append(exchange.start(mine, mine[0], shards))
                if number:
                    flights[-2].advance()
                if dice.random() < 0.2:
                    torch.randn(dice.randrange(1 << 16)).sort()
            totals += [flight.finish().clone() for flight in flights]
        return totals

    expected = [total_of(shards, parts, shards) for parts in leaves.values()]
    for totals in together(arenas(ranks, size=2_000_000), train):
        assert all(torch.equal(mine, right) for mine, right in zip(totals, expected, strict=True))


def test_buckets_of_a_step_are_settled_in_one_meeting(arenas):
    def step(arena: Arena) -> int:
        exchange = ArenaExchange(arena, 2, 2, Refusing())
        flights = [exchange.start([torch.ones(10)], torch.ones(10), 2) for _ in range(5)]
        for flight in flights:
            flight.advance()
        assert all(flight.finish().tolist() == [2.0] * 10 for flight in flights)
        return arena.meetings

    assert together(arenas(2), step) == [1, 1]


def test_what_is_larger_than_half_of_the_memory_goes_elsewhere(arenas):
    def step(arena: Arena) -> int:
        large = torch.ones(arena.size // 8 + 1)
        with pytest.raises(AssertionError, match="went elsewhere"):
            ArenaExchange(arena, 2, 2, Refusing()).start([large], large, 2)
        return arena.meetings

    assert together(arenas(2), step) == [0, 0]


def test_layouts_that_are_remembered_do_not_grow_without_end(monkeypatch, arenas):
    monkeypatch.setattr(under_test, "_MOST_LAYOUTS", 4)

    def steps(arena: Arena) -> int:
        exchange = ArenaExchange(arena, 2, 2, Refusing())
        for numel in range(1, 30):
            ones = torch.ones(numel)
            assert exchange.start([ones], ones, 2).finish().tolist() == [2.0] * numel
        return len(exchange._layouts)

    assert max(together(arenas(2), steps)) <= 4
