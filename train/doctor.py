"""What torch offers on this machine, for `samestep doctor`: one JSON object on stdout.

Without a word it tells of torch; started as ranks, with a backend's name, it measures all_reduce between them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SIZES_BYTES = (4, 1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
_SECONDS_A_SIZE = 0.5  # enough for a median, and the whole stays short on a slow machine
_MOST_REPEATS = 200


def describe() -> dict[str, Any]:
    """Version, build, backends and devices."""
    problem = ""
    with warnings.catch_warnings(record=True) as said:  # torch tells in a warning why it finds no device
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        if said and not available:
            problem = " ".join(str(said[0].message).split())[:200]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if available else []
    return {
        "version": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "cuda_problem": problem,
        "devices": names,
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
    }


def measure(backend: str) -> dict[str, Any]:
    """Seconds of one all_reduce by bytes, median over repeats; a collective of all ranks that were started.

    Bus bandwidth is 2 (n - 1) / n * bytes / seconds, as NVIDIA's nccl-tests define it: comparable over rank counts.
    """
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seconds = {size: _median(torch.zeros(size // 4, device=device)) for size in SIZES_BYTES}
    dist.barrier()
    largest = SIZES_BYTES[-1]
    return {
        "ranks": ranks,
        "seconds_by_bytes": {str(size): value for size, value in seconds.items()},
        "latency_seconds": seconds[SIZES_BYTES[0]],
        "largest_bytes": largest,
        "bus_bytes_per_s": 2 * (ranks - 1) / ranks * largest / seconds[largest],
    }


def _median(tensor: torch.Tensor) -> float:
    first = _once(tensor)  # warms up, and tells how often there is time to repeat
    repeats = torch.tensor([min(_MOST_REPEATS, max(3, int(_SECONDS_A_SIZE / max(first, 1e-6))))], device=tensor.device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN)  # the same number on every rank
    return statistics.median(_once(tensor) for _ in range(int(repeats)))


def _once(tensor: torch.Tensor) -> float:
    begin = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv: list[str]) -> None:
    """Print the answer, of rank zero alone."""
    answer = measure(argv[0]) if argv else describe()
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write(json.dumps(answer) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
