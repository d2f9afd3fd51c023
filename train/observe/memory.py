"""The most memory that this rank has ever held, and what of it is known at the start."""

from __future__ import annotations

import os
import resource
import sys

import torch
from torch import nn

from samestep.launcher.contract import RankMemory
from samestep.launcher.diagnosis import memory_signs
from samestep.train.parallel.shards import gradient_copies, owned_span

KINDS = ("host", "device")
_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux (getrusage(2))


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of KINDS: resident memory of the process, and what torch has allocated on `device` (0 on a CPU)."""
    host = memory_signs.peak_resident()
    if host is None:  # on Linux the other answer would be that of whoever has started this process, if that is larger
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def gradient_bytes(model: nn.Module) -> int:
    """Of all parameters that train, once."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def memory_at_start(model: nn.Module, rank: int, world_size: int, shards: int, parts: int) -> RankMemory:
    """What this process has mapped in, and how many gradients the exact sum is going to hold."""
    found = RankMemory(
        gradient_bytes=gradient_bytes(model),
        gradient_copies=gradient_copies(owned_span(rank, world_size, shards), world_size, shards, parts),
    )
    mapped = memory_signs.footprint(os.getpid())
    if mapped is not None:
        found |= {"resident_bytes": mapped.resident, "proportional_bytes": mapped.proportional}
    return found
