"""Where a rank's batches come from: indexed at once, fetched here, or by workers. The bits are the same, always.

How a shard is fetched is decided by the dataset's type, never by trying: tensors, arrays and TensorDataset are indexed
once with all ids. For other datasets `--num-workers auto` measures the first batches (see `watch`). Workers run ahead
of the run from epoch to epoch, so an epoch's first batches are ready when it begins; the position in the run is all
that a loader needs to know, so a restart begins anywhere.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch.utils import _pytree as pytree

from samestep.train.data.device import on_device, wait_for
from samestep.train.data.room import copied_bytes, room_of
from samestep.train.data.sampler import SameOrderSampler, ShardSamples
from samestep.train.data.shard_dataset import ShardDataset
from samestep.train.data.watch import CopyWatch, Tell, Watch
from samestep.train.data.whole import FetchBatch, whole_batches
from samestep.train.data.worker_stream import Epochs, ListsAhead, WorkerStream
from samestep.train.data.workers import Choice

Batch = Any


class Loader(Protocol):
    """Iterating gives, for each list of the sampler from its place to the end of the epoch, a batch on the device."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the rest of the epoch."""

    def close(self) -> None:
        """End what was started."""


@dataclass(slots=True)
class WholeLoader:
    """Indexes the dataset once a batch."""

    fetch: FetchBatch
    sampler: SameOrderSampler
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        """See Loader."""
        batches = (self.fetch(torch.from_numpy(ids)) for ids in self.sampler.arrays())
        return batches if self._stays else on_device(batches, self.device)

    @property
    def _stays(self) -> bool:
        """Whether what the dataset gives is on the host, as is the model: nothing has to be looked at again."""
        if self.device.type != "cpu":
            return False
        sample = self.fetch(torch.zeros(1, dtype=torch.int64))
        return all(leaf.device.type == "cpu" for leaf in pytree.tree_leaves(sample))

    def close(self) -> None:
        """Nothing was started."""


@dataclass(slots=True)
class FetchingLoader:
    """Fetches in the rank itself until workers are chosen, and then from workers."""

    shards: ShardDataset
    sampler: SameOrderSampler
    device: torch.device
    epochs: Epochs
    choice: Choice
    watch: Watch
    copies: CopyWatch
    settle: Callable[[], None]  # returns when the device is done with what was launched so far
    now: Callable[[], float] = time.perf_counter
    computing: Callable[[], float] = time.thread_time
    _stream: WorkerStream | None = None
    _coming: WorkerStream | None = None
    _lists_until_coming: int = 0
    _continues_at: tuple[int, int] | None = None  # epoch and cursor that the streams have come to
    _given: float | None = None  # when the last batch was handed over

    def __iter__(self) -> Iterator[Batch]:
        """See Loader."""
        return on_device(self._rest_of_epoch(), self.device)

    def _rest_of_epoch(self) -> Iterator[Batch]:
        begun = copy.copy(self.sampler)  # the caller may move its own while we are on the way
        if self._continues_at != (begun.epoch, begun.cursor):
            self.close()
        if self.choice.workers and self._stream is None and self._coming is None:
            self._start(self.choice, begun, 0, ahead=0)
        self._continues_at, self._given = None, None
        last = len(begun) - 1
        for number, samples in enumerate(begun):
            if number == last and (following := self.epochs.after(begun.epoch)) is not None:
                self._continues_at = (following, 0)
            yield self._next(begun, number, samples)

    def _next(self, begun: SameOrderSampler, number: int, samples: ShardSamples) -> Batch:
        if self.watch.choosing:
            self.settle()
        asked, computed = self.now(), self.computing()
        if self._coming is not None:
            self._take_over()
        batch = next(self._stream) if self._stream is not None else self.shards[samples]
        if self.watch.looking:
            step = None if self._given is None else asked - self._given
            self.watch.fetched(self.now() - asked, self.computing() - computed, step, batch)
            if self.watch.due and self._coming is None and (choice := self.watch.decision()) is not None:
                self._start(choice, begun, number + 1, self.watch.lists_to_start)
        if self._stream is not None:
            self.copies.look(self._stream.pids)
        self._given = self.now()
        return batch

    def _start(self, choice: Choice, begun: SameOrderSampler, number: int, ahead: int) -> None:
        """Start workers that take over after `ahead` more lists, the rank itself or older workers giving these.

        Without workers the rank goes on by itself at once.
        """
        self.choice = choice
        if not choice.workers:
            self.close()
        else:
            lists = ListsAhead(begun, self.epochs, number + ahead)
            self._coming = WorkerStream(self.shards, lists, choice, pin_memory=self.device.type == "cuda")
            self._lists_until_coming = ahead

    def _take_over(self) -> None:
        if self._lists_until_coming:
            self._lists_until_coming -= 1
            return
        if self._stream is not None:
            self._stream.close()
        self._stream, self._coming = self._coming, None
        self.watch.workers_took_over(self.choice)

    def close(self) -> None:
        """End all workers."""
        for stream in (self._stream, self._coming):
            if stream is not None:
                stream.close()
        self._stream = self._coming = self._continues_at = None


def build_loader(
    dataset: Any,
    sampler: SameOrderSampler,
    *,
    collate_fn: Callable[[list[Any]], Batch] | None,
    num_workers: int | Literal["auto"],
    device: torch.device,
    epochs: Epochs = Epochs(0),  # noqa: B008 (frozen)
    ranks_here: int = 1,
    tell: Tell = Tell(),  # noqa: B008 (frozen)
) -> Loader:
    """The loader that fits the dataset.

    Args:
        dataset: any map-style dataset, tensor or array.
        sampler: gives the lists; its place when iteration begins is where the loader begins.
        collate_fn: list of samples -> batch; torch's `default_collate` if None.
        num_workers: of each rank; "auto" measures.
        device: where batches are wanted.
        epochs: what workers may fetch ahead once the sampler's epoch is over; nothing by default.
        ranks_here: ranks that share this host's cores and memory.
        tell: who is told of choices and warned.
    """
    whole = whole_batches(dataset) if collate_fn is None else None
    if whole is not None:
        return WholeLoader(whole, sampler, device)
    auto = num_workers == "auto"
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return FetchingLoader(
        shards=ShardDataset(dataset, sampler.seed, collate_fn),
        sampler=sampler,
        device=device,
        epochs=epochs,
        choice=Choice(0 if num_workers == "auto" else num_workers),
        watch=Watch(lambda: room_of(ranks_here, threads), tell.choice, looking=auto),
        copies=CopyWatch(copied_bytes, tell.warning, time.monotonic),
        settle=partial(wait_for, device),
    )
