"""The DataLoader of a rank: fetches whole shards, with random streams keyed by sample.

How a shard is fetched is decided by the dataset's type, never by trying: tensors, arrays and TensorDataset are indexed
once with all ids (no Python a sample), others sample by sample (or through `__getitems__`) and then collated.
"""

from __future__ import annotations

import atexit
import multiprocessing
import shutil
from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from samestep.launcher import temporary
from samestep.launcher.contract import UsageError
from samestep.train.cause import blame
from samestep.train.data.rng import seed_collate, seed_sample, streams_restored
from samestep.train.data.sampler import SameOrderSampler, ShardSamples

Batch = Any


def require_map_style(dataset: Any, name: str) -> int:
    """Length of a dataset that can be indexed.

    Raises:
        UsageError: it is iterable only, or empty.
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UsageError(
            f"{name} is expected to be a map-style dataset with __len__ and __getitem__, "
            f"but is {type(dataset).__name__}",
            "an iterable dataset has no order that could be kept over ranks and restarts: samestep promises nothing "
            "for it and does not train on it; index it, or read it into a map-style dataset",
        )
    samples = len(cast(Sized, dataset))
    if samples == 0:
        raise UsageError(f"{name} is expected to have at least one sample, but is empty")
    return samples


class ShardDataset(Dataset[Batch]):
    """A dataset indexed by `ShardSamples`: one item is one shard's batch."""

    def __init__(self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], Batch] | None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate_fn = collate_fn or default_collate
        self.whole = collate_fn is None and _indexable_at_once(dataset)
        self.batched = hasattr(dataset, "__getitems__")

    def __getitem__(self, samples: ShardSamples) -> Batch:
        """Fetch and collate the samples of one shard."""
        if self.whole:
            batch = (
                self.dataset[torch.tensor(samples)]
                if not isinstance(self.dataset, np.ndarray)
                else self.dataset[samples]
            )
            return torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch
        with streams_restored():
            try:
                if self.batched:
                    seed_collate(self.seed, samples.epoch, samples[0])
                    items = self.dataset.__getitems__(list(samples))
                else:
                    items = [self._sample(samples.epoch, sample) for sample in samples]
                seed_collate(self.seed, samples.epoch, samples[0])
                return self.collate_fn(items)
            except Exception as error:
                blame(error, f"a batch of the dataset's samples {_listed(samples)}")
                raise

    def _sample(self, epoch: int, sample: int) -> Any:
        seed_sample(self.seed, epoch, sample)
        try:
            return self.dataset[sample]
        except Exception as error:
            blame(error, f"sample {sample} of the dataset")
            raise


def _listed(samples: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")


def _indexable_at_once(dataset: Any) -> bool:
    """A TensorDataset with a `__getitem__` of its own may draw random numbers, which are keyed by sample."""
    plain = isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__
    return plain or isinstance(dataset, torch.Tensor | np.ndarray)


def build_loader(
    dataset: Any,
    sampler: SameOrderSampler,
    *,
    collate_fn: Callable[[list[Any]], Batch] | None,
    num_workers: int | Literal["auto"],
    device: torch.device,
) -> DataLoader[Batch]:
    """DataLoader that gives, for each list of `sampler`, the collated batch."""
    shards = ShardDataset(dataset, sampler.seed, collate_fn)
    _tell_apart_temporary_files()
    workers = 0 if num_workers == "auto" or shards.whole else num_workers
    return DataLoader(
        shards,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # workers' base seed: drawn here, not from the caller's stream
    )


def _tell_apart_temporary_files() -> None:
    """Have sockets of loading processes in a folder that can be removed after a rank that was killed."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # where multiprocessing looks
    mine = temporary.folder() if "tempdir" not in settings else None
    if mine is not None:
        settings["tempdir"] = str(mine)
        atexit.register(shutil.rmtree, mine, ignore_errors=True)


def _as_is(batch: Batch) -> Batch:
    return batch
