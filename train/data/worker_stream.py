"""Batches from loader workers, from a place of the run on through all its epochs: workers are started once."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from samestep.launcher import temporary
from samestep.train.data.sampler import SameOrderSampler, ShardSamples
from samestep.train.data.shard_dataset import ShardDataset
from samestep.train.data.shield import ShieldedLoader, shield
from samestep.train.data.workers import Choice

Batch = Any


@dataclass(frozen=True, slots=True)
class Epochs:
    """Which epoch's order follows on which: the next one up to the last, or always the same one (evaluation)."""

    last: int | None

    def after(self, epoch: int) -> int | None:
        """The next epoch; None where there is none."""
        if self.last is None:
            return epoch
        return epoch + 1 if epoch < self.last else None


class ListsAhead(Sampler[ShardSamples]):
    """This rank's lists from the sampler's place on, `skip` of them left out, through all epochs that follow."""

    def __init__(self, sampler: SameOrderSampler, epochs: Epochs, skip: int = 0) -> None:
        self.sampler = copy.copy(sampler)
        self.epochs = epochs
        self.skip = skip

    def __iter__(self) -> Iterator[ShardSamples]:
        """Lists in the order in which training takes them."""
        return islice(self._all(), self.skip, None)

    def _all(self) -> Iterator[ShardSamples]:
        sampler, epoch = copy.copy(self.sampler), self.sampler.epoch
        while True:
            yield from sampler
            following = self.epochs.after(epoch)
            if following is None:
                return
            epoch = following
            sampler.set_epoch(epoch)


class WorkerStream:
    """A DataLoader's iterator that lives as long as its workers; `close` ends them."""

    def __init__(self, shards: ShardDataset, lists: ListsAhead, choice: Choice, *, pin_memory: bool) -> None:
        _tell_apart_temporary_files()
        before = set(multiprocessing.active_children())
        with warnings.catch_warnings():
            # it counts cores, not waiting
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = ShieldedLoader(
                shards,
                sampler=lists,
                batch_size=None,
                num_workers=choice.workers,
                prefetch_factor=choice.prefetch,
                collate_fn=_as_is,
                worker_init_fn=shield,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # workers' base seed: drawn here, not from the caller's stream
            )
            self._batches: Iterator[Batch] | None = iter(loader)
        self.workers = choice.workers
        self.pids = [p.pid for p in multiprocessing.active_children() if p not in before and p.pid is not None]

    def __next__(self) -> Batch:
        """The next list's batch."""
        assert self._batches is not None
        return next(self._batches)

    def close(self) -> None:
        """End the workers and wait for them; the iterator does so when nobody holds it any more."""
        self._batches = None


def _tell_apart_temporary_files() -> None:
    """Have sockets of loading processes in a folder that can be removed after a rank that was killed."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # where multiprocessing looks
    mine = temporary.folder() if "tempdir" not in settings else None
    if mine is not None:
        settings["tempdir"] = str(mine)
        atexit.register(shutil.rmtree, mine, ignore_errors=True)


def _as_is(batch: Batch) -> Batch:
    return batch
