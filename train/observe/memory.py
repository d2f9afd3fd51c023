"""The most memory that this rank has ever held."""

from __future__ import annotations

import resource
import sys

import torch

KINDS = ("host", "device")
_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux (getrusage(2))


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of KINDS: resident memory of the process, and what torch has allocated on `device` (0 on a CPU)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
