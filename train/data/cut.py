"""Batches cut into micro-batches: a tree in which every tensor has one row a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from samestep.launcher.contract import UsageError
from samestep.train.parallel.shards import MicroBatch

Batch = Any

_SHOWN = 12  # sample ids in a sentence
_HOST_KINDS = (str, bytes, int, float, bool, type(None))


def cut(batch: Batch, part: MicroBatch, samples: int) -> Batch:
    """The samples of `part`, as views, from the batch of a shard of `samples`; numbers and scalars as they are.

    Raises:
        UsageError: the batch can't be cut (see `obstacle`).
    """
    if part.first and part.last:
        return batch

    def rows(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return type(leaf)({key: cut(value, part, samples) for key, value in leaf.items()})  # type: ignore[call-arg]
        return leaf[part.begin : part.end] if _has_rows(leaf, samples) else leaf

    problem = obstacle(batch, samples)
    if problem:
        raise UsageError(
            f"with --micro-batches every tensor of a batch is expected to have one row a sample, but {problem}",
            "--micro-batches 1 leaves batches whole, and more --shards make them smaller",
        )
    return pytree.tree_map(rows, batch, is_leaf=lambda node: _has_rows(node, samples))


def has_no_rows(batch: Batch) -> bool:
    """Whether all tensors of a batch are of no samples; most begin with one that is not."""
    first = batch[0] if type(batch) in (tuple, list) and batch else batch
    if isinstance(first, Tensor) and first.numel():
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return bool(leaves) and not any(map(len, leaves))


def empty_batch(samples: Sequence[int], name: str = "loss") -> UsageError:
    """The error of a loss or metric, called `name`, that is NaN over a batch without rows, made of `samples`.

    Its gradient may be 0 all the same, so that nothing else would stop the run.
    """
    shown = ", ".join(map(str, samples[:_SHOWN])) + (", ..." if len(samples) > _SHOWN else "")
    return UsageError(
        f"collate_fn is expected to make a batch of the samples that it gets, but left out all of samples "
        f"{shown}, and the {name} of nothing is not finite",
        f"keep every sample, or let {name} return Weighted(total, weight), both 0 where it is given none",
    )


def obstacle(batch: Batch, samples: int) -> str:
    """What in the batch of a shard of `samples` can't be cut; empty if all can."""
    for leaf in pytree.tree_leaves(batch, is_leaf=lambda node: _has_rows(node, samples)):
        if isinstance(leaf, Mapping):  # one that torch does not know as a tree
            problem = obstacle(dict(leaf), samples)
            if problem:
                return problem
        elif isinstance(leaf, Tensor | np.ndarray):
            if leaf.ndim and not _has_rows(leaf, samples):
                return f"a batch of {samples} samples has a tensor of shape {tuple(leaf.shape)}"
        elif not _has_rows(leaf, samples) and not isinstance(leaf, _HOST_KINDS):
            return f"a batch holds a {type(leaf).__name__}"
    return ""


def _has_rows(node: Any, samples: int) -> bool:
    """One row a sample: a tensor or array, or a list as collating leaves strings."""
    if isinstance(node, list | tuple):
        return len(node) == samples and all(isinstance(item, _HOST_KINDS) for item in node)
    return isinstance(node, Tensor | np.ndarray) and node.ndim > 0 and len(node) == samples
