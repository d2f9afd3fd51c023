"""Whether a step's gradients hold a NaN or an infinity, found at the least cost that misses none."""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

_LARGE = 1 << 14  # elements from which on a sum costs a CPU less than the check
_FEW = 32  # gradients up to which sums of all cost less than sums of some and a check of the others


def any_not_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Float32 of shape (1,) on the gradients' device: above 0 if one has a NaN or infinity. They keep their bits."""
    device = gradients[0].device
    if device.type != "cpu":
        return _look(gradients, next(_flags(device)), _one(device))
    found, one = _on_cpu()
    if suspects := _suspects(gradients):
        _look(suspects, found, one)
        if found.item():
            _on_cpu.cache_clear()
    return found


def _suspects(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those that have to be looked at: NaN and infinity stay in a sum, so where that is finite nothing is left to find.

    A sum only reads, while torch's check writes each element back; for small gradients one check of all costs less.
    """
    large = [gradient for gradient in gradients if gradient.numel() >= _LARGE]
    if large and len(gradients) <= _FEW:
        return () if _finite_sum(gradients) else gradients
    return [g for g in gradients if g.numel() < _LARGE or not _finite_sum([g])] if large else gradients


def _finite_sum(gradients: Sequence[Tensor]) -> bool:
    return cmath.isfinite(sum(gradient.sum().item() for gradient in gradients))


def _look(gradients: Sequence[Tensor], found: Tensor, one: Tensor) -> Tensor:
    for same in _by_dtype(gradients):
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)
    return found


@lru_cache(maxsize=16)
def _flags(device: torch.device) -> Iterator[Tensor]:
    """One zero after the other: many are made at once, in the time of one."""
    return (
        flag
        for zeros in iter(partial(torch.zeros, 64, dtype=torch.float32, device=device), None)
        for flag in zeros.split(1)
    )


@lru_cache(maxsize=1)
def _on_cpu() -> tuple[Tensor, Tensor]:
    """A flag that stays zero until something is found, and a one: making them in each step takes as long as to look."""
    return torch.zeros(1, dtype=torch.float32), torch.ones(1, dtype=torch.float32)


@lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


def _by_dtype(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    dtypes = {gradient.dtype for gradient in gradients}
    if len(dtypes) == 1 and not gradients[0].is_complex():
        return [list(gradients)]
    real = [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in gradients]
    kinds = {gradient.dtype: None for gradient in real}
    return [[gradient for gradient in real if gradient.dtype == dtype] for dtype in kinds]
