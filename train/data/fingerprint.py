"""A short description by which a resumed run recognises that its dataset is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samestep.train.cause import blame
from samestep.train.data.rng import seed_sample, streams_restored
from samestep.train.data.streams import STREAMS

_LOOKED_AT = 8


class Look(NamedTuple):
    """A few evenly spaced samples of a dataset.

    Attributes:
        fingerprint: length, type and sha256 of the samples, drawn as in epoch 0; equal datasets give equal text.
        drawn: whether random numbers were drawn for each.
    """

    fingerprint: str
    drawn: tuple[bool, ...]


def look_at(dataset: Any, seed: int) -> Look:
    """Read a few samples, seeded as in epoch 0; the caller's streams are as before."""
    samples = len(cast(Sized, dataset))
    sha, drawn = hashlib.sha256(), []
    with streams_restored():
        for number in range(min(_LOOKED_AT, samples)):
            index = number * (samples - 1) // max(1, min(_LOOKED_AT, samples) - 1)
            seed_sample(seed, 0, index)
            before = [stream.mark() for stream in STREAMS]
            try:
                sample = dataset[index]
            except BaseException as error:
                blame(error, f"sample {index} of the dataset")
                raise
            sha.update(content(sample))
            drawn.append(before != [stream.mark() for stream in STREAMS])
    text = f"{samples} samples of {type(dataset).__name__}, sha256 {sha.hexdigest()[:16]}"
    return Look(text, tuple(drawn))


def content(tree: Any) -> bytes:
    """The numbers and words of a sample or batch, by which it is compared; of other objects the name of their class."""
    return b"".join(_of_leaf(leaf) for leaf in pytree.tree_leaves(tree))


def _of_leaf(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        if leaf.layout != torch.strided:
            leaf = leaf.to_dense()
        if leaf.dtype.is_floating_point:
            leaf = leaf.double()
        leaf = leaf.numpy()
    if isinstance(leaf, np.ndarray | np.generic):
        array = np.ascontiguousarray(leaf)
        return f"{array.shape}".encode() + (array.tobytes() if array.dtype != object else repr(array).encode())
    if isinstance(leaf, str | bytes | int | float | bool | None):
        return repr(leaf).encode()
    return type(leaf).__name__.encode()
