"""Datasets that can be indexed, and what to do with those that can't."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from samestep.launcher.contract import UsageError


def require_map_style(dataset: Any, name: str) -> int:
    """Length of a dataset that can be indexed.

    Raises:
        UsageError: it has no samples to index by their number, or none at all.
    """
    hint = _obstacle(dataset)
    if hint:
        what = f"the class {dataset.__name__}" if isinstance(dataset, type) else type(dataset).__name__
        raise UsageError(
            f"{name} is expected to be a map-style dataset with __len__ and __getitem__, but is {what}", hint
        )
    samples = len(cast(Sized, dataset))
    if samples == 0:
        raise UsageError(f"{name} is expected to have at least one sample, but is empty")
    return samples


def _obstacle(dataset: Any) -> str:
    """The way out where samples can't be had by their number; empty where they can."""
    if isinstance(dataset, type):
        return f"make one of it: {dataset.__name__}(…)"
    ways_out = {
        "pass what it loads, as in loader.dataset: --global-batch-size, --num-workers and collate_fn say the rest": (
            isinstance(dataset, DataLoader)
        ),
        "pass one dataset out of it, as in data['train']; TensorDataset(x, y) makes samples of tensors": (
            isinstance(dataset, Mapping) and 0 not in dataset
        ),
        "pass one of them, or ConcatDataset of all": _is_list_of(dataset, Dataset),
        "TensorDataset(x, y) makes samples of tensors": _is_columns(dataset),
        "a path is no dataset: read it in build": isinstance(dataset, str | bytes | Path),
        "an iterable dataset has no order that could be kept over ranks and restarts: samestep promises nothing for it "
        "and does not train on it; index it, or read it into a map-style dataset": (
            isinstance(dataset, IterableDataset)
            or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
        ),
    }
    return next((hint for hint, fits in ways_out.items() if fits), "")


def _is_list_of(dataset: Any, kinds: Any) -> bool:
    return isinstance(dataset, tuple | list) and bool(dataset) and all(isinstance(part, kinds) for part in dataset)


def _is_columns(dataset: Any) -> bool:
    """Whether it is (x, y): tensors of equal length and other shapes, which no batch could be made of as samples."""
    if not _is_list_of(dataset, Tensor | np.ndarray) or not all(part.ndim for part in dataset):
        return False
    return len({len(part) for part in dataset}) == 1 and len({tuple(part.shape) for part in dataset}) > 1
