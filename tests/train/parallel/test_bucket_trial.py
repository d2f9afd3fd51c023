"""Sizes of buckets take turns, the fastest stays, and without a reason the first one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from samestep.train.parallel.bucket_trial import (
    ROUNDS,
    SETTLING,
    STEPS,
    BucketTrial,
    FixedBuckets,
    bucket_trial,
    fastest,
)

MIB = 2**20


def trained_with(
    seconds: Callable[[float, int], float], sizes: tuple[float, ...], *, every: int, steps: int
) -> tuple[list[float], list[str]]:
    """The size of each step and what was said; steps take `seconds(size, step)` and are told `every` so many."""
    current, used, told = [sizes[0]], [], []
    trial = BucketTrial(sizes, lambda size: current.__setitem__(0, size))
    for first in range(0, steps, every):
        used += [current[0]] * every
        told.append(trial.took(first, [seconds(current[0], step) for step in range(first, first + every)]))
    return used, list(filter(None, told))


def _of_size(seconds: dict[float, float], size: float, step: int) -> float:
    return seconds[size]


@pytest.mark.parametrize("every", [1, 2, 7, 23, 100])
def test_the_size_with_the_shortest_steps_stays(every: int) -> None:
    for best in (25.0, 5.0, 100.0):
        seconds = {size: 0.1 if size == best else 0.2 for size in (25.0, 5.0, 100.0)}
        steps = 10 * ROUNDS * 3 * max(every, STEPS)
        used, told = trained_with(partial(_of_size, seconds), tuple(seconds), every=every, steps=steps)
        assert used[-1] == best
        assert set(used) == {25.0, 5.0, 100.0}
        assert len(told) == 1
        assert told[0].startswith(f"gradients travel in buckets of {best:g} MB: a step takes 100 ms, 200 ms with ")


def test_what_is_hardly_faster_changes_nothing() -> None:
    used, (told,) = trained_with(lambda size, _: 0.098 if size == 5.0 else 0.1, (25.0, 5.0), every=10, steps=400)
    assert used[-1] == 25.0
    assert told == "gradients travel in buckets of 25 MB: a step takes 100 ms, 98 ms with 5 MB"


def test_first_steps_of_a_turn_and_a_slow_moment_decide_nothing() -> None:
    """A new size makes new buckets; and the whole first round may be slow, as all first steps of a run are."""
    since = {"size": 0.0, "step": 0}

    def seconds(size: float, step: int) -> float:
        if size != since["size"]:
            since.update(size=size, step=step)
        if step - since["step"] < SETTLING:
            return 9.0
        return (0.1 if size == 5.0 else 0.2) + (1.0 if step < 2 * STEPS else 0.0)

    used, _ = trained_with(seconds, (25.0, 5.0), every=1, steps=200)
    assert used[-1] == 5.0


def test_steps_that_are_done_again_settle_anew() -> None:
    trial = BucketTrial((25.0, 5.0), lambda size: None)
    trial.took(0, [0.1] * (SETTLING + 1))
    trial.took(0, [9.0] * SETTLING)
    assert trial._turns == [[0.1]]


@pytest.mark.parametrize(
    ("megabytes", "ranks", "exact", "sizes"),
    [
        (4, 2, True, None),
        (5, 2, True, None),
        (6, 2, True, [25.0, 5.0]),
        (25, 8, True, [25.0, 5.0]),
        (26, 8, True, [25.0, 5.0, 100.0]),
        (5000, 2, True, [25.0, 5.0, 100.0]),
        (5000, 1, True, None),
        (5000, 2, False, None),
    ],
)
def test_sizes_that_cut_gradients_alike_are_not_tried(
    megabytes: int, ranks: int, exact: bool, sizes: list[float] | None
) -> None:
    trial = bucket_trial(megabytes * MIB, ranks, lambda size: None, exact=exact)
    assert (trial.sizes if isinstance(trial, BucketTrial) else None) == sizes
    assert isinstance(trial, FixedBuckets) == (sizes is None)
    if sizes is None:
        assert trial.took(0, [1.0] * 1000) == ""


def test_turns_go_round() -> None:
    assert fastest((25.0, 5.0), [0.3, 0.2, 0.1, 0.2]) == (25.0, {25.0: 0.1, 5.0: 0.2})
    assert fastest((25.0, 5.0), [0.3, 0.2, 0.3, 0.1]) == (5.0, {25.0: 0.3, 5.0: 0.1})
