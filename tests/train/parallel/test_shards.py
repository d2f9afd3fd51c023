"""Shards, their owners and the one tree: pure functions, tried for every small V and W."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.train.parallel.exchange import present_roots
from samestep.train.parallel.shards import (
    Fold,
    Span,
    StepPlan,
    gradient_copies,
    midpoint,
    owned_span,
    roots,
    slice_of,
    smallest_shard,
    tree_sum,
)

DOCS = Path(__file__).resolve().parents[3] / "docs" / "memory.md"
CASES = [(shards, world) for shards in range(1, 13) for world in range(1, shards + 4)]


def join(left: str, right: str) -> str:
    """Neither commutative nor associative, so any other tree gives another string."""
    return f"({left}+{right})"


def reference(lo: int, hi: int, present: int) -> str | None:
    """The tree as it is defined: split at the midpoint, empty shards add nothing."""
    if hi - lo == 1:
        return str(lo) if lo < present else None
    middle = (lo + hi) // 2
    parts = [part for part in (reference(lo, middle, present), reference(middle, hi, present)) if part is not None]
    return join(*parts) if len(parts) == 2 else (parts[0] if parts else None)


def test_owned_spans_partition_the_shards() -> None:
    for shards, world in CASES:
        owned = [shard for rank in range(world) for shard in range(*owned_span(rank, world, shards))]
        assert owned == list(range(shards)), (shards, world)


def test_ranks_own_near_equal_numbers_of_shards() -> None:
    for shards, world in CASES:
        sizes = [hi - lo for lo, hi in (owned_span(rank, world, shards) for rank in range(world))]
        assert max(sizes) - min(sizes) <= 1, (shards, world)


def test_roots_partition_the_owned_span_into_subtrees_of_the_tree() -> None:
    def subtrees(span: Span) -> set[Span]:
        if span[1] - span[0] == 1:
            return {span}
        middle = midpoint(span)
        return {span} | subtrees((span[0], middle)) | subtrees((middle, span[1]))

    for shards, world in CASES:
        for rank in range(world):
            owned = owned_span(rank, world, shards)
            found = roots(owned, (0, shards))
            assert [shard for span in found for shard in range(*span)] == list(range(*owned)), (shards, world, rank)
            assert set(found) <= subtrees((0, shards))


def test_roots_are_as_large_as_they_can_be() -> None:
    for shards, world in CASES:
        for rank in range(world):
            found = set(roots(owned_span(rank, world, shards), (0, shards)))
            for lo, hi in found:
                siblings = {(a, b) for a, b in found if b == lo or a == hi}
                for a, b in siblings:
                    parent = (min(a, lo), max(b, hi))
                    is_node = roots(parent, (0, shards)) == [parent]
                    assert not (is_node and midpoint(parent) in (lo, hi)), (shards, world, rank)


@pytest.mark.parametrize("power", range(5))
def test_with_two_to_the_k_ranks_each_owns_one_subtree(power: int) -> None:
    world = 2**power
    for factor in range(1, 4):
        shards = world * factor
        assert all(len(roots(owned_span(rank, world, shards), (0, shards))) == 1 for rank in range(world))


def test_the_sum_is_one_tree_for_every_world_size_and_any_trailing_empty_shards() -> None:
    for shards, world in CASES:
        for present in range(1, shards + 1):
            known: dict[Span, str] = {}
            by_rank = present_roots(world, shards, present)
            for rank in range(world):
                for span in by_rank[rank]:
                    fold: Fold[str] = Fold(span, join)
                    for shard in range(*span):
                        fold.push(shard, str(shard) if shard < present else None)
                    assert fold.total is not None
                    known[span] = fold.total
            expected = reference(0, shards, present)
            assert tree_sum((0, shards), known, join) == expected, (shards, world, present)


def test_a_fold_holds_at_most_one_partial_sum_a_level() -> None:
    for shards in range(1, 65):
        fold: Fold[str] = Fold((0, shards), join)
        for shard in range(shards):
            fold.push(shard, str(shard))
            assert len(fold.partial) <= shards.bit_length() + 1
        assert fold.total == reference(0, shards, shards)


def test_pending_sums_added_innermost_first_complete_the_tree() -> None:
    """What the communication hook does for a rank's last shard, also where the shards behind it are empty."""
    for lo in range(5):
        for hi in range(lo + 1, lo + 13):
            for last in range(lo, hi):
                fold: Fold[str] = Fold((lo, hi), join)
                for shard in range(lo, last):
                    fold.push(shard, str(shard))
                value = str(last)
                for partial in reversed(fold.pending(last)):
                    value = join(partial, value)
                whole: Fold[str] = Fold((lo, hi), join)
                for shard in range(lo, hi):
                    whole.push(shard, str(shard) if shard <= last else None)
                assert value == whole.total, (lo, hi, last)


def test_a_tree_of_empty_shards_has_no_sum() -> None:
    fold: Fold[str] = Fold((0, 5), join)
    for shard in range(5):
        fold.push(shard, None)
    assert fold.total is None
    assert tree_sum((0, 5), {}, join) is None


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(1, 64))
def test_slices_partition_their_range_near_equally_and_largest_first(lo: int, length: int, parts: int) -> None:
    slices = [slice_of(lo, lo + length, part, parts) for part in range(parts)]
    assert slices[0][0] == lo
    assert slices[-1][1] == lo + length
    assert all(left[1] == right[0] for left, right in itertools.pairwise(slices))
    sizes = [end - begin for begin, end in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "only trailing shards may be empty"


@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 12))
def test_smallest_shard_is_the_smallest_that_occurs(samples: int, batch: int, shards: int) -> None:
    sizes = [
        size
        for begin in range(0, samples, batch)
        for shard in range(shards)
        if (size := StepPlan(0, 0, begin, min(begin + batch, samples), shards).size(shard))
    ]
    assert smallest_shard(samples, batch, shards) == min(sizes)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 15))
def test_everyone_works_is_told_from_the_plan_alone(samples: int, shards: int, world: int) -> None:
    plan = StepPlan(0, 0, 100, 100 + samples, shards)
    busy = [any(plan.size(shard) for shard in range(*owned_span(rank, world, shards))) for rank in range(world)]
    assert plan.everyone_works(world) == all(busy)
    assert plan.present((0, shards)) == list(range(min(samples, shards)))


class Counted:
    """A sum that knows how many of its kind are alive."""

    alive = most = 0

    def __init__(self) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("shards", [2, 3, 5, 8, 13])
def test_copies_of_gradients_are_those_that_a_fold_holds(shards: int, parts: int) -> None:
    Counted.alive = Counted.most = 0

    def add(left: Counted, right: Counted) -> Counted:
        return Counted()

    fold = Fold((0, shards), add)
    for shard in range(shards):
        leaf = Counted()
        for _ in range(parts - 1):
            leaf = add(leaf, Counted())
        fold.push(shard, leaf)
        del leaf
    assert gradient_copies((0, shards), 1, shards, parts) == Counted.most


@pytest.mark.parametrize(
    ("rank", "world_size", "shards", "parts", "copies"),
    [
        (0, 1, 1, 1, 1),  # plain backward
        (0, 1, 1, 4, 1),  # which adds up by itself
        (0, 2, 2, 1, 1),  # DDP's buckets alone
        (1, 2, 2, 2, 2),  # and the first part's
        (1, 2, 2, 3, 4),  # the sum of two parts, while it is made
        (0, 2, 4, 1, 2),  # the first shard's, to which the hook adds the second one in place
        (1, 2, 3, 1, 2),  # of two roots one is complete
    ],
)
def test_copies_of_gradients_with_other_ranks(rank: int, world_size: int, shards: int, parts: int, copies: int) -> None:
    assert gradient_copies(owned_span(rank, world_size, shards), world_size, shards, parts) == copies


def test_the_documented_copies_are_these() -> None:
    rows = re.findall(r"^\| (\d), (\d) \| (\d) \| (\d) \|$", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 5
    for world_size, shards, *documented in (map(int, row) for row in rows):
        spans = [owned_span(rank, world_size, shards) for rank in range(world_size)]
        assert documented == [max(gradient_copies(span, world_size, shards, n) for span in spans) for n in (1, 2)]
