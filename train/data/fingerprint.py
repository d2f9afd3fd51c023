"""A short description by which a resumed run recognises that its dataset is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from samestep.train.data.rng import seed_sample, streams_restored

_LOOKED_AT = 8


def dataset_fingerprint(dataset: Any, seed: int) -> str:
    """Length, type and sha256 of a few evenly spaced samples, drawn as in epoch 0; equal datasets give equal text."""
    samples = len(cast(Sized, dataset))
    sha = hashlib.sha256()
    with streams_restored():
        for number in range(min(_LOOKED_AT, samples)):
            index = number * (samples - 1) // max(1, min(_LOOKED_AT, samples) - 1)
            seed_sample(seed, 0, index)
            for leaf in pytree.tree_leaves(dataset[index]):
                sha.update(_content(leaf))
    return f"{samples} samples of {type(dataset).__name__}, sha256 {sha.hexdigest()[:16]}"


def _content(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        if leaf.dtype.is_floating_point:
            leaf = leaf.double()
        leaf = leaf.numpy()
    if isinstance(leaf, np.ndarray | np.generic):
        array = np.ascontiguousarray(leaf)
        return f"{array.shape}".encode() + (array.tobytes() if array.dtype != object else repr(array).encode())
    if isinstance(leaf, str | bytes | int | float | bool | None):
        return repr(leaf).encode()
    return type(leaf).__name__.encode()
