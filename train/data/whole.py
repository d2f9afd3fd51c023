"""Datasets that give a whole batch for a list of ids, recognised by their type: no Python runs for a sample."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

# int64 ids, shape (n,), on the host -> what default_collate makes of these samples
FetchBatch = Callable[[Tensor], Any]

_NUMBERS = "biufc"  # kinds of numpy's dtypes that torch has too


def whole_batches(dataset: Any) -> FetchBatch | None:
    """How to index `dataset` with all ids of a batch, or None where its samples have to be asked for one by one.

    A subclass with a `__getitem__` of its own may draw random numbers, which are keyed by sample: that is None. So is
    one with `__getitems__`, which torch's DataLoader asks first.
    """
    if isinstance(dataset, Tensor):
        return _of_tensor(dataset) if dataset.dim() and dataset.layout == torch.strided else None
    if isinstance(dataset, np.ndarray):
        return _of_array(dataset) if dataset.ndim and dataset.dtype.kind in _NUMBERS and _is_torchs(dataset) else None
    if isinstance(dataset, TensorDataset):
        if type(dataset).__getitem__ is not TensorDataset.__getitem__ or hasattr(dataset, "__getitems__"):
            return None
        return _of_tensors(dataset.tensors)
    if type(dataset) is Subset:
        return _of_subset(dataset)
    return None


def _is_torchs(array: Any) -> bool:
    """Whether torch has numbers such as these: none of another byte order, or longer than a double."""
    try:
        torch.from_numpy(array[:0])
    except (TypeError, ValueError):
        return False
    return True


def _of_tensor(tensor: Tensor) -> FetchBatch:
    if tensor.device.type == "cpu":
        return lambda ids: tensor.index_select(0, ids)
    return lambda ids: tensor.index_select(0, ids.to(tensor.device, non_blocking=True))


def _of_array(array: Any) -> FetchBatch:
    return lambda ids: torch.from_numpy(array[ids.numpy()])


def _of_tensors(tensors: tuple[Tensor, ...]) -> FetchBatch | None:
    columns = [whole_batches(tensor) for tensor in tensors]
    known = [column for column in columns if column is not None]
    return (lambda ids: tuple([column(ids) for column in known])) if len(known) == len(columns) else None


def _of_subset(subset: Subset[Any]) -> FetchBatch | None:
    whole = whole_batches(subset.dataset)
    if whole is None:
        return None
    chosen = torch.as_tensor(list(subset.indices), dtype=torch.int64)
    from_the_end = chosen + len(cast(Sized, subset.dataset))
    chosen = torch.where(chosen < 0, from_the_end, chosen)
    return lambda ids: whole(chosen.index_select(0, ids))
