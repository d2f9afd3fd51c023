"""A dataset indexed by the list of a shard's samples, with random streams keyed by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset, default_collate

from samestep.train.cause import blame
from samestep.train.data.rng import each_seeded, seed_collate, streams_restored
from samestep.train.data.sampler import ShardSamples

Batch = Any


class ShardDataset(Dataset[Batch]):
    """One item is one shard's batch: fetched sample by sample, or through `__getitems__`, and then collated."""

    def __init__(self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], Batch] | None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate_fn = collate_fn or default_collate
        self.batched = hasattr(dataset, "__getitems__")

    def __getitem__(self, samples: ShardSamples) -> Batch:
        """Fetch and collate the samples of one shard; the caller's random streams stay as they are."""
        with streams_restored():
            try:
                if self.batched:
                    seed_collate(self.seed, samples.epoch, samples[0])
                    items = self.dataset.__getitems__(list(samples))
                else:
                    items = self._one_by_one(samples)
                seed_collate(self.seed, samples.epoch, samples[0])
                return self.collate_fn(items)
            except Exception as error:
                blame(error, f"a batch of the dataset's samples {_listed(samples)}")
                raise

    def _one_by_one(self, samples: ShardSamples) -> list[Any]:
        items: list[Any] = []
        try:
            for sample in each_seeded(self.seed, samples.epoch, samples):
                items.append(self.dataset[sample])  # noqa: PERF401 (its length tells which sample failed)
        except Exception as error:
            blame(error, f"sample {samples[len(items)]} of the dataset")
            raise
        return items


def _listed(samples: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")
