"""Keyed streams: the same place gives the same numbers, another place others."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from samestep.train.data.rng import (
    seed_batch,
    seed_collate,
    seed_evaluation,
    seed_everything,
    seed_sample,
    seed_shard,
    streams_restored,
)

Drawn = tuple[float, float, float]


def draw() -> Drawn:
    return random.random(), float(np.random.rand()), torch.rand((), dtype=torch.float64).item()


def drawn_after(seed: Callable[..., None], *place: int) -> Drawn:
    seed(*place)
    return draw()


def test_numbers_are_a_function_of_the_place() -> None:
    for seed in (seed_shard, seed_sample, seed_batch, seed_collate, seed_evaluation):
        first = drawn_after(seed, 3, 4, 5)
        draw()
        assert drawn_after(seed, 3, 4, 5) == first


def test_no_two_places_share_their_numbers() -> None:
    found: list[Drawn] = [drawn_after(seed_everything, seed) for seed in range(3)]
    for seed in (seed_shard, seed_sample, seed_batch, seed_collate, seed_evaluation):
        found += [drawn_after(seed, a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    for stream in range(3):
        assert len({values[stream] for values in found}) == len(found)


def test_streams_are_frozen() -> None:
    """A change here changes dropout and augmentation of everybody's runs."""
    seed_shard(0, 0, 0)
    assert (random.getrandbits(32), int(np.random.randint(2**31)), int(torch.randint(2**31, ()))) == (
        2029450188,
        29952712,
        1512265901,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_streams_come_back_also_after_an_exception(fails: bool) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with streams_restored():
            seed_sample(9, 9, 9)
            draw()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert draw() == expected


def test_the_largest_seed_is_a_seed() -> None:
    seed_shard(2**63 - 1, 2**40, 2**20)
    draw()
