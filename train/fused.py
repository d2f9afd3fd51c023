"""A word where the optimizer could update all parameters in one kernel. It stays as the user wrote it."""

from __future__ import annotations

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

_FUSED = (Adam, AdamW, SGD)


def fused_hint(optimizer: Optimizer, device: torch.device) -> str:
    """A sentence where `fused=True` would do on a CUDA device and nobody chose another implementation; else empty.

    torch.optim's fused implementations take floating parameters and do not differentiate through the update; classes
    derived from torch's may do anything.
    """
    groups = optimizer.param_groups
    chosen = any(group.get(name) is not None for group in groups for name in ("fused", "foreach"))
    special = any(group.get(name) for group in groups for name in ("differentiable", "capturable"))
    floating = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    if device.type != "cuda" or type(optimizer) not in _FUSED or chosen or special or not floating:
        return ""
    name = type(optimizer).__name__
    return (
        f"{name}(..., fused=True) can be faster on this GPU; its bits differ from the default's, so it is your choice"
    )
