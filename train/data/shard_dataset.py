"""A dataset indexed by the list of a shard's samples, with random streams keyed by sample.

Seeding three generators for a sample takes longer than many a dataset needs to make it, so only those are seeded from
which it draws. Its first samples show which. The others are held while a batch is made: should a sample draw from one
of them after all, the batch is made once more with that one seeded too. Of Python's stream samples get the first words
only; the batch is made once more, too, when one of them needs more. The bits are those of seeding all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.utils.data import Dataset, Subset, default_collate

from samestep.train.cause import blame
from samestep.train.data.first_words import FirstWords
from samestep.train.data.rng import seed_batch, seed_collate, seed_samples, streams_restored
from samestep.train.data.sampler import ShardSamples
from samestep.train.data.streams import STREAMS, Stream, brought_back

Batch = Any

_LOOKED_AT = 32  # samples
_FIRST_WORDS = FirstWords()
_PYTHON = 0  # position in STREAMS
_WORTH_IT = 8  # samples of a batch from which on holding streams is cheaper than seeding them


class ShardDataset(Dataset[Batch]):
    """One item is one shard's batch: fetched sample by sample, or through `__getitems__`, and then collated."""

    def __init__(self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], Batch] | None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate_fn = collate_fn or default_collate
        self.batched = makes_batches(dataset)
        self._looked_at = 0
        self._drawn: set[int] = set()  # positions in STREAMS
        self._first_words_do = True  # no sample was seen that needs more

    def __getitem__(self, samples: ShardSamples) -> Batch:
        """Fetch and collate the samples of one shard; the caller's random streams stay as they are."""
        try:
            items = None if self.batched else self._holding(samples)
            if items is not None and self.collate_fn is default_collate:
                return default_collate(items)
            with streams_restored():
                if items is None:
                    items = self._seeding_all(samples)
                seed_collate(self.seed, samples.epoch, samples[0])
                return self.collate_fn(items)
        except BaseException as error:
            blame(error, f"a batch of the dataset's samples {_listed(samples)}")
            raise

    def _holding(self, samples: ShardSamples) -> list[Any] | None:
        """The samples, if they draw from no other streams than those that are seeded for each of them."""
        if self._looked_at < _LOOKED_AT or len(samples) < _WORTH_IT:
            return None
        seeded = {number: STREAMS[number] for number in sorted(self._drawn)}
        watched = {number: stream.hold() for number, stream in enumerate(STREAMS) if number not in seeded}
        if _PYTHON in seeded and self._first_words_do and _FIRST_WORDS.is_safe():
            seeded[_PYTHON], watched[_PYTHON] = _FIRST_WORDS, _FIRST_WORDS.more_was_drawn
        found: set[int] = set()
        with streams_restored(seeded.values()):
            try:
                with brought_back() as found:
                    items = self._one_by_one(samples, seeded.values())
            except Exception:
                if self._more_were_drawn(watched, found):  # which may be why
                    return None
                raise
            return None if self._more_were_drawn(watched, found) else items

    def _more_were_drawn(self, watched: dict[int, Callable[[], bool]], found: set[int]) -> bool:
        more = {number for number, was_drawn in watched.items() if was_drawn() or number in found}
        if more & self._drawn:
            self._first_words_do = False
        self._drawn |= more
        return bool(more)

    def _seeding_all(self, samples: ShardSamples) -> Any:
        if not self.batched:
            return self._one_by_one(samples, STREAMS)
        seed_batch(self.seed, samples.epoch, samples[0])
        return self.dataset.__getitems__(list(samples))

    def _one_by_one(self, samples: ShardSamples, seeded: Collection[Stream]) -> list[Any]:
        items: list[Any] = []
        dataset, looking = self.dataset, self._looked_at < _LOOKED_AT
        seeding = seed_samples(seeded, self.seed, samples.epoch, samples)
        try:
            for sample, _ in zip(samples, seeding, strict=False):
                items.append(self._look_at(sample) if looking else dataset[sample])
        except BaseException as error:
            blame(error, f"sample {samples[len(items)]} of the dataset")
            raise
        return items

    def _look_at(self, sample: int) -> Any:
        """A sample; note from which of the streams, just seeded, it draws."""
        marks = [stream.mark() for stream in STREAMS]
        with brought_back() as drawn:
            item = self.dataset[sample]
        self._drawn |= drawn | {number for number, stream in enumerate(STREAMS) if stream.mark() != marks[number]}
        self._looked_at += 1
        return item


def makes_batches(dataset: Any) -> bool:
    """Whether `dataset` has a `__getitems__` of its own: torch's Subset only hands on to what it is a part of."""
    if type(dataset) is Subset:
        return makes_batches(dataset.dataset)
    return hasattr(dataset, "__getitems__")


def _listed(samples: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")
