"""Random numbers as a function of where they are drawn, so that no generator state has to be saved or moved.

Forward and backward of a shard draw from streams keyed by (seed, step, shard); a sample's `__getitem__` from streams
keyed by (seed, epoch, sample). Python's, numpy's and torch's global generators are seeded; whoever calls a loader gets
the streams back as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from samestep.train.data.order import begin, extend, extend_each, key

# Domains keep keys of different uses apart.
_INIT, _SHARD, _SAMPLE, _COLLATE, _EVALUATION = range(1, 6)


def seed_everything(seed: int) -> None:
    """Seed what `build` draws from: the same on every rank and at every start."""
    _seed_all(key(_INIT, seed))


def seed_shard(seed: int, step: int, shard: int) -> None:
    """Seed what one shard's forward and backward draw from."""
    _seed_all(extend(begin(4, _SHARD, seed), step, shard))


def seed_evaluation(seed: int, batch: int, shard: int) -> None:
    """Seed what the forward of one shard of an evaluation batch draws from."""
    _seed_all(key(_EVALUATION, seed, batch, shard))


def seed_sample(seed: int, epoch: int, sample: int) -> None:
    """Seed the CPU streams that a dataset draws from while it makes one sample."""
    _seed_cpu(key(_SAMPLE, seed, epoch, sample))


def each_seeded(seed: int, epoch: int, samples: Sequence[int]) -> Iterator[int]:
    """The samples one after another, each when `seed_sample` is done for it."""
    keys = extend_each(begin(4, _SAMPLE, seed, epoch), samples)
    for sample, value in zip(samples, keys, strict=True):
        _seed_cpu(value)
        yield sample


def seed_collate(seed: int, epoch: int, first_sample: int) -> None:
    """Seed the CPU streams that `collate_fn` draws from; a shard is known by its first sample."""
    _seed_cpu(key(_COLLATE, seed, epoch, first_sample))


@contextmanager
def streams_restored() -> Iterator[None]:
    """Give the caller's CPU streams back as they were, also after an exception."""
    python, numeric, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(tensor)


def _seed_all(value: int) -> None:
    _seed_cpu(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def _seed_cpu(value: int) -> None:
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # as much as torch's own CPU stream takes; 64 bits cost 4 times more
    torch.default_generator.manual_seed(value - (1 << 64) if value >> 63 else value)
