"""What `--reduction exact` costs a rank as ranks grow, network left out: torch's fake process group moves nothing.

    python benchmarks/tree_1024.py [RANKS ...]      2 8 64 256 1024 if none are given

One bucket of a million float32 (4 MB), one shard a rank. Per number of ranks one JSON line: milliseconds of the first
sum, which works out who owns which subtree, and of later ones (median); messages and bytes that the rank sends; bytes
that it holds at once besides the gradient. Messages grow with the ranks, as they do in a ring, and so does the first
sum; of a later one the part that is Python, one addition for each rank. Bytes stay as they are.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from samestep.train.parallel.exchange import TreeExchange

NUMEL = 1_000_000
ROUNDS = 9


def sum_once(exchange: TreeExchange, gradient: torch.Tensor) -> tuple[float, int]:
    """Milliseconds of this rank's own work, and bytes held besides the gradient."""
    began = time.perf_counter()
    flight = exchange.start([gradient], gradient, exchange.shards)
    flight.advance()
    total = flight.finish()
    took = 1000 * (time.perf_counter() - began)
    received = getattr(flight, "received", gradient.new_empty(0))
    return took, received.untyped_storage().nbytes() + total.untyped_storage().nbytes()


def measure(ranks: int) -> dict[str, float]:
    """A rank in the middle, of a world in which the others say nothing."""
    rank = ranks // 2
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        exchange, gradient = TreeExchange(rank, ranks, ranks), torch.randn(NUMEL)
        first, held = sum_once(exchange, gradient)
        later = [sum_once(exchange, gradient)[0] for _ in range(ROUNDS)]
    finally:
        dist.destroy_process_group()
    sent = 2 * (ranks - 1) / ranks * NUMEL * 4  # slices to the others, then the own summed slice to each of them
    return {
        "first_ms": round(first, 3),
        "later_ms": round(statistics.median(later), 3),
        "messages": 2 * (ranks - 1),
        "sent_mb": round(sent / 1e6, 3),
        "held_mb": round(held / 1e6, 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    for ranks in [int(word) for word in sys.argv[1:]] or [2, 8, 64, 256, 1024]:
        print(json.dumps({"ranks": ranks} | measure(ranks)), flush=True)


if __name__ == "__main__":
    main()
