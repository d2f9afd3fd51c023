"""What people know of torch.utils.data.DistributedSampler holds for SameOrderSampler too; what it lacks is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from samestep.train import SameOrderSampler

Make = Callable[..., DistributedSampler[Any]]
DATA = TensorDataset(torch.arange(10))


def ours(dataset: Any, **options: Any) -> DistributedSampler[Any]:
    return SameOrderSampler(dataset, global_batch_size=4, **options)


both = pytest.mark.parametrize("make", [DistributedSampler, ours], ids=["torch", "ours"])


def flat(sampler: DistributedSampler[Any]) -> list[int]:
    return [index for part in sampler for index in (part if isinstance(part, list) else [part])]


def test_it_is_a_distributed_sampler() -> None:
    """So that code which asks for the type, to call set_epoch, finds it."""
    assert isinstance(ours(DATA, num_replicas=2, rank=0), DistributedSampler)


@both
@pytest.mark.parametrize("rank", [3, -1, 100])
def test_an_invalid_rank_raises_value_error(make: Make, rank: int) -> None:
    with pytest.raises(ValueError, match=r"Invalid rank|rank"):
        make(DATA, num_replicas=3, rank=rank)


@both
def test_without_arguments_it_needs_a_process_group(make: Make) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        make(DATA)


@both
def test_world_and_rank_come_from_the_process_group(make: Make) -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sampler = make(DATA)
    finally:
        dist.destroy_process_group()
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    assert sorted(flat(sampler)) == list(range(10))


@both
def test_set_epoch_changes_the_order_and_comes_back(make: Make) -> None:
    sampler = make(DATA, num_replicas=1, rank=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(flat(sampler))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


@both
def test_iterating_twice_gives_the_same_order(make: Make) -> None:
    sampler = make(DATA, num_replicas=2, rank=1)
    assert flat(sampler) == flat(sampler)


@both
def test_the_seed_changes_the_order(make: Make) -> None:
    assert flat(make(DATA, num_replicas=1, rank=0, seed=0)) != flat(make(DATA, num_replicas=1, rank=0, seed=1))


@both
def test_without_shuffle_one_rank_has_the_datasets_order(make: Make) -> None:
    assert flat(make(DATA, num_replicas=1, rank=0, shuffle=False)) == list(range(10))


@both
def test_len_is_the_number_of_items(make: Make) -> None:
    for rank in range(3):
        sampler = make(DATA, num_replicas=3, rank=rank)
        assert len(sampler) == len(list(sampler))


@both
def test_ranks_are_disjoint_where_the_length_divides(make: Make) -> None:
    parts = [flat(make(DATA, num_replicas=5, rank=rank)) for rank in range(5)]
    assert sorted(index for part in parts for index in part) == list(range(10))


def test_an_uneven_length_repeats_samples_in_torch_and_none_here() -> None:
    torchs = [index for rank in range(4) for index in flat(DistributedSampler(DATA, num_replicas=4, rank=rank))]
    mine = [index for rank in range(4) for index in flat(ours(DATA, num_replicas=4, rank=rank))]
    assert len(torchs) == 12
    assert sorted(mine) == list(range(10))


def test_the_order_does_not_depend_on_torchs_generator() -> None:
    torch.manual_seed(1)
    first = flat(ours(DATA, num_replicas=1, rank=0))
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert flat(ours(DATA, num_replicas=1, rank=0)) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_loader_fetches_each_sample_once() -> None:
    found = []
    for rank in range(3):
        sampler = ours(DATA, num_replicas=3, rank=rank)
        loader = DataLoader(DATA, batch_sampler=sampler)
        found += [int(value) for (batch,) in loader for value in batch]
    assert sorted(found) == list(range(10))
