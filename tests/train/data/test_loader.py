"""Loading: random streams keyed by sample, the caller's streams untouched, one batch whatever way it was fetched."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from samestep.launcher.contract import UsageError
from samestep.train import SameOrderSampler
from samestep.train.checks import check_batch_repeats, check_samples_repeat
from samestep.train.data.fingerprint import look_at
from samestep.train.data.loader import build_loader
from samestep.train.data.map_style import require_map_style
from samestep.train.data.shield import kill_the_rest
from samestep.train.data.whole import whole_batches

pytestmark = pytest.mark.timeout(60)
CPU = torch.device("cpu")
N = 23


class Augmented(Dataset[Any]):
    """Each sample drawn from all three global generators, with its own number in front."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        drawn = [random.random(), float(np.random.rand()), torch.rand((), dtype=torch.float64).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class AtOnce(Augmented):
    """The same, with torch's optional method for a whole batch."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


def batches(
    dataset: Any, *, world: int = 1, workers: int = 0, epoch: int = 0, shards: int = 3, **more: Any
) -> list[Any]:
    """Batches of all ranks in the order of steps and shards."""
    samplers = [
        SameOrderSampler(dataset, world, rank, seed=more.get("seed", 0), global_batch_size=7, shards=shards)
        for rank in range(world)
    ]
    streams: list[Iterator[Any]] = []
    with contextlib.ExitStack() as opened:
        for sampler in samplers:
            sampler.set_epoch(epoch)
            loader = build_loader(dataset, sampler, collate_fn=more.get("collate_fn"), num_workers=workers, device=CPU)
            opened.callback(loader.close)
            streams.append(iter(loader))
        return [
            next(streams[rank])
            for plan in samplers[0].plans()
            for rank in range(world)
            for _ in plan.present(samplers[rank].owned)
        ]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "dataset", [Augmented(), AtOnce(), Subset(Augmented(), range(N))], ids=["items", "getitems", "subset"]
)
def test_augmentation_is_the_same_for_any_workers_and_ranks(dataset: Any) -> None:
    expected = batches(dataset)
    for world, workers in ((1, 1), (1, 2), (2, 0), (3, 0), (2, 1)):
        random.seed(world), np.random.seed(workers), torch.manual_seed(world)
        assert same(batches(dataset, world=world, workers=workers), expected), (world, workers)


class AsksForItsWorker(Augmented):
    """Seeds by the worker that it is in, as many a dataset does."""

    def __getitem__(self, index: int) -> Tensor:
        worker = torch.utils.data.get_worker_info()
        return super().__getitem__(index) + (0 if worker is None else 1 + worker.id)


def test_a_dataset_that_asks_for_its_worker_gives_the_same_samples_in_all() -> None:
    expected = batches(AsksForItsWorker())
    assert same(batches(AsksForItsWorker(), workers=1), expected)
    assert same(batches(AsksForItsWorker(), workers=2), expected)


def test_a_samples_augmentation_does_not_depend_on_how_the_batch_is_cut() -> None:
    def rows(**options: Any) -> dict[int, Tensor]:
        return {int(row[0]): row for batch in batches(Augmented(), **options) for row in batch}

    one = rows(shards=1)
    for shards in (2, 5, 9):
        cut = rows(shards=shards)
        assert all(torch.equal(cut[index], one[index]) for index in range(N))


def test_augmentation_differs_between_samples_epochs_and_seeds() -> None:
    drawn = [
        tuple(row[1:].tolist())
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
        for batch in batches(Augmented(), epoch=epoch, seed=seed)
        for row in batch
    ]
    for stream in range(3):
        assert len({values[stream] for values in drawn}) == 3 * N


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "dataset", [Augmented(), AtOnce(), TensorDataset(torch.arange(N))], ids=["items", "getitems", "tensors"]
)
def test_the_callers_streams_are_as_before(dataset: Any, workers: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    python, numeric, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    batches(dataset, workers=workers)
    assert random.getstate() == python
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(after, numeric, strict=True))
    assert torch.equal(torch.get_rng_state(), tensor)


def noises(items: Any) -> tuple[list[list[float]], list[float]]:
    """What the samples drew, and what collate_fn then draws."""
    return [item[1:].tolist() for item in items], Augmented()[0][1:].tolist()


@pytest.mark.parametrize(
    "dataset", [Augmented(), AtOnce(), Subset(Augmented(), range(N))], ids=["items", "getitems", "subset"]
)
def test_collate_fn_draws_other_numbers_than_the_samples(dataset: Any) -> None:
    for drawn, more in batches(dataset, collate_fn=noises):
        for stream in range(3):
            assert more[stream] not in [sample[stream] for sample in drawn]


@pytest.mark.parametrize("nested", [False, True])
def test_a_part_of_a_plain_dataset_is_keyed_by_sample_as_the_dataset_is(nested: bool) -> None:
    """All of it, in its own order, so that positions are the dataset's."""
    part: Any = Subset(Augmented(), range(N))
    assert same(batches(Subset(part, range(N)) if nested else part), batches(Augmented()))


def test_a_part_may_count_from_the_end() -> None:
    whole = TensorDataset(torch.arange(5.0))
    for part in (Subset(whole, [-1, 0, -5]), Subset(Subset(whole, [4, 0]), [-2, -1, -1])):
        fetch = whole_batches(part)
        assert fetch is not None
        assert fetch(torch.arange(3))[0].tolist() == [part[index][0].item() for index in range(3)]


def test_a_part_of_a_dataset_that_makes_batches_is_made_at_once() -> None:
    assert same(batches(Subset(AtOnce(), range(N))), batches(AtOnce()))


class Failing(Augmented):
    def __getitem__(self, index: int) -> Tensor:
        super().__getitem__(index)
        if index == 13:
            raise ValueError("this image is broken")
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_the_dataset_names_the_sample_and_leaves_the_streams(workers: int) -> None:
    random.seed(1)
    before = random.getstate()
    with pytest.raises(ValueError, match="broken") as raised:
        batches(Failing(), workers=workers)
    kill_the_rest()  # as train does: the traceback holds them
    told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert "sample 13" in told
    assert random.getstate() == before


class Pairs(Dataset[Any]):
    """TensorDataset's samples, one by one."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


def test_tensors_indexed_at_once_give_the_batches_of_the_slow_way() -> None:
    x, y = torch.randn(N, 3, 2), torch.arange(N)
    fast, slow = batches(TensorDataset(x, y)), batches(Pairs(x, y))
    assert len(fast) == len(slow)
    for left, right in zip(fast, slow, strict=True):
        assert same(list(left), list(right))


def test_tensor_and_array_datasets_give_tensors() -> None:
    x = torch.randn(N, 3)
    rows = [part[0] for part in batches(TensorDataset(x))]
    assert same(batches(x), rows)
    assert same(batches(x.numpy()), rows)


class NoisyTensors(TensorDataset):
    """A TensorDataset whose samples are random all the same."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return (super().__getitem__(index)[0] + torch.randn(3),)


def test_a_tensor_dataset_with_its_own_getitem_is_keyed_by_sample() -> None:
    dataset = NoisyTensors(torch.zeros(N, 3))
    torch.manual_seed(1)
    expected = [part[0] for part in batches(dataset)]
    torch.manual_seed(2)
    assert same([part[0] for part in batches(dataset, world=2)], expected)
    rows = torch.cat(expected)
    assert len({tuple(row.tolist()) for row in rows}) == N, "each sample has its own noise"


def test_a_custom_collate_function_gets_the_samples_and_keyed_streams() -> None:
    def collate(items: list[Tensor]) -> dict[str, Any]:
        return {"ids": [int(item[0]) for item in items], "noise": random.random(), "more": torch.rand(2)}

    expected = batches(Augmented(), collate_fn=collate)
    random.seed(77)
    for world, workers in ((2, 0), (1, 2)):
        found = batches(Augmented(), collate_fn=collate, world=world, workers=workers)
        assert [part["ids"] for part in found] == [part["ids"] for part in expected]
        assert [part["noise"] for part in found] == [part["noise"] for part in expected]
        assert same([part["more"] for part in found], [part["more"] for part in expected])
    assert len({part["noise"] for part in expected}) == len(expected)


def test_a_custom_collate_function_is_called_for_tensor_datasets_too() -> None:
    found = batches(TensorDataset(torch.arange(N)), collate_fn=lambda items: [int(item[0]) for item in items])
    assert sorted(value for part in found for value in part) == list(range(N))
    assert all(isinstance(part, list) for part in found)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@pytest.mark.parametrize(
    "dataset", [Endless(), iter([1, 2]), (i for i in range(3)), 7], ids=["iterable", "iter", "gen", "int"]
)
def test_what_can_not_be_indexed_is_refused_and_the_promise_said(dataset: Any) -> None:
    with pytest.raises(UsageError, match=f"map-style.*{type(dataset).__name__}") as raised:
        require_map_style(dataset, "train_data")
    assert "iterable" in raised.value.hint


@pytest.mark.parametrize(
    "dataset", [[], TensorDataset(torch.empty(0, 3)), torch.empty(0)], ids=["list", "tensors", "tensor"]
)
def test_an_empty_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(UsageError, match=r"train_data.*empty"):
        require_map_style(dataset, "train_data")


def test_anything_with_len_and_getitem_is_a_dataset() -> None:
    assert require_map_style([1, 2, 3], "train_data") == 3
    assert require_map_style(np.zeros((4, 2)), "train_data") == 4


class BatchesOfTheirOwn(TensorDataset):
    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return [(self.tensors[0][index] * 2,) for index in indices]


@pytest.mark.parametrize("part", [lambda whole: whole, lambda whole: Subset(whole, range(8))])
def test_a_tensor_dataset_that_makes_batches_of_its_own_is_asked_for_them(part: Any) -> None:
    dataset = part(BatchesOfTheirOwn(torch.ones(N, 3)))
    assert whole_batches(dataset) is None
    assert all(batch[0].eq(2).all() for batch in batches(dataset))


@pytest.mark.parametrize("kind", [">f4", "longdouble"])
def test_an_array_that_torch_does_not_have_is_not_indexed_at_once(kind: str) -> None:
    assert whole_batches(np.zeros((4, 2), kind)) is None
    assert whole_batches(np.zeros((4, 2), "<f4")) is not None


class Kept(Dataset[Any]):
    """What it drew once it gives for ever; `fresh`: it keeps what it read, and draws each time."""

    def __init__(self, *, fresh: bool) -> None:
        self.fresh = fresh
        self.kept: dict[int, float] = {}

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> float:
        if index not in self.kept:
            self.kept[index] = index + (0.0 if self.fresh else random.random())
        return self.kept[index] + (random.random() if self.fresh else 0.0)


def test_a_dataset_that_keeps_what_it_drew_is_refused() -> None:
    fresh, stale = Kept(fresh=True), Kept(fresh=False)
    check_samples_repeat(fresh, 3, look_at(fresh, 3))
    look = look_at(stale, 3)
    with pytest.raises(UsageError, match="Kept drew some the first time only"):
        check_samples_repeat(stale, 3, look)


class InBatches(Kept):
    """Makes all samples of a batch at once, with a generator of its own or the global one."""

    def __init__(self, *, own: bool) -> None:
        super().__init__(fresh=True)
        self.draws = random.Random(0).random if own else random.random

    def __getitems__(self, indices: list[int]) -> list[float]:
        return [index + self.draws() for index in indices]


def test_a_batch_that_comes_out_otherwise_the_second_time_is_refused() -> None:
    data, own, kept = TensorDataset(torch.arange(5.0)), np.random.default_rng(0), deque([0.0], maxlen=1)

    def stays(samples: list[Any]) -> Any:
        return default_collate(samples)[0] + torch.rand(1) + np.random.rand()

    def draws(samples: list[Any]) -> Any:
        return default_collate(samples)[0] + own.random()

    def mixes_with_the_last(samples: list[Any]) -> dict[str, float]:
        kept.append(kept[0] + float(samples[0][0]) + 1)
        return {"mean": kept[0]}

    def wants_four(samples: list[Any]) -> Any:
        return torch.stack([sample[0] for sample in samples]).reshape(-1, 4)

    for collate_fn in (None, stays, wants_four):
        check_batch_repeats(data, 3, collate_fn)
    check_batch_repeats(InBatches(own=False), 3)
    for collate_fn in (draws, mixes_with_the_last):
        with pytest.raises(UsageError, match="but collate_fn gave another one"):
            check_batch_repeats(data, 3, collate_fn)
    with pytest.raises(UsageError, match="but __getitems__ gave another one"):
        check_batch_repeats(InBatches(own=True), 3)


def test_the_one_of_two_that_makes_another_batch_is_blamed() -> None:
    own = np.random.default_rng(0)

    def stays(samples: list[Any]) -> Any:
        return torch.tensor(samples) + torch.rand(1) + np.random.rand()

    def draws(samples: list[Any]) -> Any:
        return torch.tensor(samples) + own.random()

    check_batch_repeats(InBatches(own=False), 3, stays)
    with pytest.raises(UsageError, match="but __getitems__ gave another one"):
        check_batch_repeats(InBatches(own=True), 3, stays)
    with pytest.raises(UsageError, match="but collate_fn gave another one"):
        check_batch_repeats(InBatches(own=False), 3, draws)


def test_looking_at_batches_leaves_samples_whole_that_collating_takes_apart() -> None:
    samples = [{"x": number, "label": number} for number in range(4)]

    def pops(items: list[dict[str, int]]) -> Any:
        labels = [item.pop("label") for item in items]
        return default_collate(items), labels

    check_batch_repeats(samples, 3, pops)
    assert all("label" in sample for sample in samples)


def test_sparse_samples_are_looked_at() -> None:
    look = look_at(torch.eye(3).to_sparse(), 0)
    assert look == look_at(torch.eye(3).to_sparse(), 0)
    assert look.fingerprint != look_at(2 * torch.eye(3).to_sparse(), 0).fingerprint
