"""Batches on the device of the model, there before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = Any

_HOST_KINDS = (str, bytes, int, float, bool, type(None))
# Bytes of pageable memory that a copy takes over before it returns, without waiting for the device (seen on an H100, by
# tests/gpu); a stream of its own would cost the host more than the copy the device.
_SMALL = 1 << 16


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was told; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, on `device`; large ones go to a GPU on a stream of their own, one batch ahead of use."""
    if device.type == "cuda":
        return _one_ahead(batches, device, torch.cuda.Stream(device))
    return (send_to_device(batch, device) for batch in batches)


def _one_ahead(batches: Iterator[Batch], device: torch.device, side: Any) -> Iterator[Batch]:
    """Copy the next batch while the device works on this one; the host waits for neither."""
    use = torch.cuda.current_stream(device)
    coming = _start_copy(batches, device, side, use)
    while coming is not None:
        batch, copied = coming
        if copied is not None:
            use.wait_event(copied)
            for leaf in pytree.tree_leaves(batch):
                if isinstance(leaf, Tensor):  # in the side stream's memory, not to be used again before `use` is done
                    leaf.record_stream(use)
        coming = _start_copy(batches, device, side, use)
        yield batch
        del batch


def _start_copy(batches: Iterator[Batch], device: torch.device, side: Any, use: Any) -> tuple[Batch, Any] | None:
    """The next batch on its way and the event after it, if it is on the side; None where there is none."""
    for batch in batches:
        leaves = pytree.tree_leaves(batch)
        # A class of its own may hold tensors that record_stream would have to know.
        known = all(isinstance(leaf, (Tensor, *_HOST_KINDS)) for leaf in leaves)
        if not known or all(_is_small(leaf) for leaf in leaves):
            return send_to_device(batch, device, non_blocking=True), None
        pinned = pytree.tree_map_only(Tensor, _pinned, batch)  # the host would wait for pageable memory
        side.wait_stream(use)  # samples that live on the device may be in the making
        with side:
            return send_to_device(pinned, device, non_blocking=True), side.record_event()
    return None


def _is_small(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or leaf.numel() * leaf.element_size() <= _SMALL


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()
