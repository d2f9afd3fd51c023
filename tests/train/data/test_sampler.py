"""SameOrderSampler: the same lists for any number of ranks, each sample once, from any cursor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from samestep.launcher.contract import UsageError
from samestep.train import SameOrderSampler


def lists_of_all_ranks(
    world: int, samples: int, state: dict[str, int] | None = None, **options: Any
) -> list[list[int]]:
    """What the ranks of one world fetch, put together in the order of steps and shards."""
    samplers = [SameOrderSampler(range(samples), world, rank, **options) for rank in range(world)]
    for sampler in samplers:
        if state:
            sampler.load_state_dict(state)
    streams = [iter(sampler) for sampler in samplers]
    found = [
        list(next(streams[rank]))
        for plan in samplers[0].plans()
        for rank in range(world)
        for _ in plan.present(samplers[rank].owned)
    ]
    assert all(next(stream, None) is None for stream in streams), "a rank has more lists than the plan"
    return found


cases = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 400),
        "global_batch_size": st.integers(1, 80),
        "shards": st.integers(1, 9),
        "seed": st.integers(0, 2**63 - 1),
        "shuffle": st.booleans(),
    }
)


@given(cases, st.integers(1, 12))
def test_all_ranks_together_fetch_what_one_rank_fetches(case: dict[str, Any], world: int) -> None:
    assert lists_of_all_ranks(world, **case) == lists_of_all_ranks(1, **case)


@given(cases, st.integers(1, 12), st.integers(0, 5))
def test_each_sample_is_used_once_an_epoch(case: dict[str, Any], world: int, epoch: int) -> None:
    found = lists_of_all_ranks(world, state={"epoch": epoch, "cursor": 0}, **case)
    assert all(found), "no list is empty"
    assert sorted(sample for part in found for sample in part) == list(range(case["samples"]))


@given(cases, st.integers(1, 12))
def test_global_batches_are_slices_of_the_order_and_shards_near_equal(case: dict[str, Any], world: int) -> None:
    found = lists_of_all_ranks(world, **case)
    order = [sample for part in lists_of_all_ranks(1, **case | {"shards": 1}) for sample in part]
    batch, shards = case["global_batch_size"], case["shards"]
    for begin in range(0, case["samples"], batch):
        expected = order[begin : begin + batch]
        parts = [found.pop(0) for _ in range(min(shards, len(expected)))]
        assert [sample for part in parts for sample in part] == expected
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert not found


@given(cases, st.integers(1, 12), st.data())
def test_len_is_the_number_of_lists_from_any_cursor(case: dict[str, Any], world: int, data: st.DataObject) -> None:
    case = dict(case)
    samples = case.pop("samples")
    cursor = data.draw(st.integers(0, samples))
    for rank in range(world):
        sampler = SameOrderSampler(range(samples), world, rank, **case)
        sampler.load_state_dict({"epoch": 1, "cursor": cursor})
        assert len(sampler) == len(list(sampler))


@given(cases, st.integers(1, 8), st.integers(1, 8), st.data())
def test_state_moves_to_any_number_of_ranks_in_the_middle_of_an_epoch(
    case: dict[str, Any], before: int, after: int, data: st.DataObject
) -> None:
    batch, samples = case["global_batch_size"], case["samples"]
    steps = data.draw(st.integers(0, -(-samples // batch)))
    epoch = data.draw(st.integers(0, 3))
    old = SameOrderSampler(range(samples), before, 0, **{k: v for k, v in case.items() if k != "samples"})
    old.set_epoch(epoch)
    old.cursor = min(steps * batch, samples)
    state = old.state_dict()
    assert state == {"epoch": epoch, "cursor": min(steps * batch, samples)}
    whole = lists_of_all_ranks(1, state={"epoch": epoch, "cursor": 0}, **case)
    rest = lists_of_all_ranks(after, state=state, **case)
    assert rest == whole[len(whole) - len(rest) :]
    assert sum(map(len, rest)) == samples - state["cursor"]


def test_long_epochs_cross_the_chunks_in_which_they_are_permuted() -> None:
    for batch in (1000, 65_536, 70_000, 200_000):
        found = lists_of_all_ranks(3, 150_000, global_batch_size=batch, shards=4)
        one = lists_of_all_ranks(1, 150_000, global_batch_size=batch, shards=4)
        assert found == one
        assert sorted(sample for part in found for sample in part) == list(range(150_000))
        flat = lists_of_all_ranks(1, 150_000, global_batch_size=7_777, shards=1)
        assert [s for part in one for s in part] == [s for part in flat for s in part]


def test_without_shuffling_the_order_is_the_datasets() -> None:
    found = lists_of_all_ranks(2, 10, global_batch_size=4, shards=2, shuffle=False)
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9]]


def test_more_ranks_than_shards_leave_some_idle_and_lose_nothing() -> None:
    lengths = [len(list(SameOrderSampler(range(20), 5, rank, global_batch_size=6, shards=2))) for rank in range(5)]
    assert sum(lengths) == 2 * 4
    assert lengths.count(0) == 3


@pytest.mark.parametrize(("replicas", "rank"), [(2, 2), (2, -1), (1, 1)])
def test_a_rank_outside_the_world_is_a_value_error(replicas: int, rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        SameOrderSampler(range(4), replicas, rank, global_batch_size=2)


def test_without_world_and_process_group_the_base_class_complains() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        SameOrderSampler(range(4), global_batch_size=2)


@pytest.mark.parametrize(
    "bad", [{"global_batch_size": 0}, {"global_batch_size": -3}, {"shards": 0}, {"drop_last": True}]
)
def test_bad_settings_are_usage_errors_that_name_the_setting(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SameOrderSampler(range(4), 1, 0, **{"global_batch_size": 2} | bad)


@pytest.mark.parametrize("cursor", [-1, 11])
def test_a_cursor_outside_the_dataset_is_refused(cursor: int) -> None:
    sampler = SameOrderSampler(range(10), 1, 0, global_batch_size=2)
    with pytest.raises(UsageError, match="10"):
        sampler.load_state_dict({"epoch": 0, "cursor": cursor})


def test_set_epoch_begins_a_new_epoch() -> None:
    sampler = SameOrderSampler(range(10), 1, 0, global_batch_size=5)
    sampler.load_state_dict({"epoch": 2, "cursor": 5})
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"epoch": 3, "cursor": 0}


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index * index)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_a_batch_sampler_for_torchs_own_data_loader(workers: int) -> None:
    batches: list[list[int]] = []
    for rank in range(2):
        sampler = SameOrderSampler(Squares(), 2, rank, seed=4, global_batch_size=6, shards=3)
        loader = DataLoader(Squares(), batch_sampler=sampler, num_workers=workers)
        assert len(loader) == len(sampler)
        got = [batch.tolist() for batch in loader]
        assert got == [[index * index for index in part] for part in sampler]
        batches += got
    assert sorted(value for batch in batches for value in batch) == [index * index for index in range(23)]
