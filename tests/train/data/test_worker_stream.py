"""Workers run ahead over epochs, take over in the middle of one, change no batch, and are gone afterwards."""

from __future__ import annotations

import multiprocessing
import os
import re
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samestep.train import SameOrderSampler
from samestep.train.data.loader import FetchingLoader, build_loader
from samestep.train.data.watch import Tell, Watch
from samestep.train.data.worker_stream import Epochs
from samestep.train.data.workers import Choice

pytestmark = pytest.mark.timeout(90)
N, EPOCHS = 40, 3


class Noisy(Dataset[Any]):
    """A sample's number, noise of its own, and the process that made it."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand((), dtype=torch.float64).item(), os.getpid()], dtype=torch.float64)


def loader_of(num_workers: Any = 0, **more: Any) -> tuple[FetchingLoader, SameOrderSampler]:
    sampler = SameOrderSampler(Noisy(), 1, 0, seed=3, global_batch_size=8, shards=2)
    loader = build_loader(
        Noisy(),
        sampler,
        collate_fn=None,
        num_workers=num_workers,
        device=torch.device("cpu"),
        epochs=Epochs(EPOCHS - 1),
        **more,
    )
    assert isinstance(loader, FetchingLoader)
    return loader, sampler


def run(loader: FetchingLoader, sampler: SameOrderSampler) -> list[Tensor]:
    """Batches of all epochs, taken as training takes them: never one more than there are."""
    found = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches = iter(loader)
        found += [next(batches) for _ in range(len(sampler))]
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a[:, :2], b[:, :2]) for a, b in zip(left, right, strict=True))


def makers(batches: list[Tensor]) -> set[int]:
    return {int(pid) for batch in batches for pid in batch[:, 2]}


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return run(*loader_of())


def test_workers_live_over_all_epochs_and_none_is_left(expected: list[Tensor]) -> None:
    loader, sampler = loader_of(2)
    before = set(multiprocessing.active_children())
    found = run(loader, sampler)
    assert same(found, expected)
    assert len(makers(found)) == 2, "the same two processes in every epoch"
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    assert not any(psutil.pid_exists(pid) for pid in makers(found))


class Scripted(Watch):
    """Says what it is told to after so many lists."""

    def __init__(self, at: dict[int, int], ahead: int) -> None:
        super().__init__(lambda: None, lambda *_: None)  # type: ignore[arg-type, return-value]
        self.at, self.ahead, self.lists = at, ahead, 0

    def fetched(self, *_: Any) -> None:
        self.lists += 1

    @property
    def due(self) -> bool:
        return self.lists in self.at

    def decision(self) -> Choice | None:
        self.lists_to_start = self.ahead
        return Choice(self.at.pop(self.lists))


@pytest.mark.parametrize("ahead", [0, 3, 8, 25])
def test_workers_that_take_over_on_the_way_change_no_batch(expected: list[Tensor], ahead: int) -> None:
    loader, sampler = loader_of("auto")
    loader.watch = Scripted({4: 1}, ahead)
    found = run(loader, sampler)
    assert same(found, expected)
    mine = [index for index, batch in enumerate(found) if makers([batch]) == {os.getpid()}]
    assert mine == list(range(4 + ahead)), "this process goes on until the workers are ready"
    loader.close()


@pytest.mark.parametrize("back", [9, 10, 11, 15])
def test_workers_that_are_sent_away_leave_batches_as_they_are(expected: list[Tensor], back: int) -> None:
    loader, sampler = loader_of("auto")
    loader.watch = Scripted({4: 2, back: 0}, 2)
    found = run(loader, sampler)
    assert same(found, expected)
    theirs = [index for index, batch in enumerate(found) if makers([batch]) != {os.getpid()}]
    assert theirs == list(range(6, back)), "this process goes on at once"
    assert not any(psutil.pid_exists(pid) for pid in makers(found) - {os.getpid()})
    loader.close()


def test_more_workers_take_over_from_fewer(expected: list[Tensor]) -> None:
    loader, sampler = loader_of("auto")
    loader.watch = Scripted({2: 1, 12: 2}, 2)
    found = run(loader, sampler)
    assert same(found, expected)
    assert len(makers(found)) == 4, "this process, the one, and the two"
    loader.close()
    assert not any(psutil.pid_exists(pid) for pid in makers(found) - {os.getpid()})


@pytest.mark.parametrize("workers", [0, 2])
def test_it_begins_wherever_the_sampler_is_put(expected: list[Tensor], workers: int) -> None:
    loader, sampler = loader_of(workers)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    sampler.load_state_dict({"epoch": 1, "cursor": 16})  # as after going back to a checkpoint
    batches = iter(loader)
    assert same([next(batches) for _ in range(len(sampler))], expected[14:20])
    sampler.set_epoch(2)
    assert same(list(loader), expected[20:])
    loader.close()


def test_evaluation_goes_over_the_same_epoch_again() -> None:
    sampler = SameOrderSampler(Noisy(), 1, 0, shuffle=False, seed=3, global_batch_size=8, shards=2)
    more: Any = {"collate_fn": None, "device": torch.device("cpu"), "epochs": Epochs(None)}
    loader = build_loader(Noisy(), sampler, num_workers=1, **more)
    first, second = list(loader), list(loader)
    assert same(first, second)
    assert makers(first) == makers(second)
    loader.close()


def test_auto_measures_says_one_line_and_uses_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    from samestep.train.data import loader as module
    from samestep.train.data.workers import Room

    monkeypatch.setattr(module, "room_of", lambda ranks, threads: Room(4.0, 1, 1 << 30, 4 << 30))
    said: list[str] = []
    loader, sampler = loader_of("auto", tell=Tell(lambda choice, text: said.append(text)))
    ticks = iter(range(10**6))
    loader.now = lambda: next(ticks) * 0.1  # a clock by which every fetch takes long
    loader.computing = lambda: 0.0
    settled: list[bool] = []
    loader.settle = lambda: settled.append(loader.watch.choosing)
    found = run(loader, sampler)
    assert len(said) >= 1
    assert all(settled), "a device is waited for only where a choice depends on it"
    assert 0 < len(settled) < len(found)
    assert re.match(r"\d loader workers? a rank: ", said[0])
    assert makers(found) != {os.getpid()}
    loader.close()
