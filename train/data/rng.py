"""Random numbers as a function of where they are drawn, so that no generator state has to be saved or moved.

Forward and backward of a shard draw from streams keyed by (seed, step, shard); a sample's `__getitem__` from streams
keyed by (seed, epoch, sample); a dataset's `__getitems__`, and `collate_fn`, each from streams of its own keyed by
(seed, epoch, first sample of the shard). Python's, numpy's and torch's global generators are seeded; whoever calls a
loader gets the streams back as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch

from samestep.train.data.order import begin, extend, extend_each, key
from samestep.train.data.streams import STREAMS, Stream

SPEC = "splitmix64-mt19937/2"  # changes when the same place draws other numbers

# Domains keep keys of different uses apart.
_INIT, _SHARD, _SAMPLE, _COLLATE, _EVALUATION, _BATCH, _PASS = range(1, 8)
_BLOCK = 64


def seed_everything(seed: int) -> None:
    """Seed what `build` draws from: the same on every rank and at every start."""
    _seed_all(key(_INIT, seed))


def seed_shard(seed: int, step: int, shard: int) -> None:
    """Seed what one shard's forward and backward draw from."""
    block, within = divmod(step, _BLOCK)
    _seed_all(extend(_keys_of_steps(seed, block)[within], shard))


@lru_cache(maxsize=4)
def _keys_of_steps(seed: int, block: int) -> list[int]:
    """Keys of _BLOCK steps as far as all their shards share them: one at a time they take three times as long."""
    return extend_each(begin(4, _SHARD, seed), range(block * _BLOCK, (block + 1) * _BLOCK))


def seed_of_pass(seed: int, number: int) -> int:
    """What `seed_shard` is given for one of several passes over a step: for the first one, number 0, `seed` itself."""
    return seed if number == 0 else key(_PASS, seed, number)


def seed_evaluation(seed: int, batch: int, shard: int) -> None:
    """Seed what the forward of one shard of an evaluation batch draws from."""
    _seed_all(key(_EVALUATION, seed, batch, shard))


def seed_sample(seed: int, epoch: int, sample: int) -> None:
    """Seed the CPU streams that a dataset draws from while it makes one sample."""
    next(seed_samples(STREAMS, seed, epoch, [sample]))


def seed_samples(streams: Collection[Stream], seed: int, epoch: int, samples: Sequence[int]) -> Iterator[Any]:
    """At each turn seed these streams for the next sample, as `seed_sample` does."""
    keys = extend_each(begin(4, _SAMPLE, seed, epoch), samples)
    return zip(*(stream.seed_each(keys) for stream in streams), strict=True) if streams else repeat(None)


def seed_batch(seed: int, epoch: int, first_sample: int) -> None:
    """Seed the CPU streams that a dataset draws from while it makes all samples of a shard at once."""
    _seed_cpu(key(_BATCH, seed, epoch, first_sample))


def seed_collate(seed: int, epoch: int, first_sample: int) -> None:
    """Seed the CPU streams that `collate_fn` draws from; a shard is known by its first sample."""
    _seed_cpu(key(_COLLATE, seed, epoch, first_sample))


@contextmanager
def streams_restored(streams: Collection[Stream] = STREAMS) -> Iterator[None]:
    """Give the caller's CPU streams back as they were, also after an exception."""
    states = [stream.save() for stream in streams]
    try:
        yield
    finally:
        for stream, state in zip(streams, states, strict=True):
            stream.load(state)


def _seed_all(value: int) -> None:
    _seed_cpu(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


_SEEDS = [stream.seed for stream in STREAMS]


def _seed_cpu(value: int) -> None:
    for seed in _SEEDS:
        seed(value)
