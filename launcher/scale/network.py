"""Pure: how long the gradients' sum takes on W ranks, and how much of it the backward pass hides.

The model is Hockney's: a message of n bytes takes alpha + n / beta, with alpha the latency in seconds and beta the
bandwidth of one rank in bytes/s (R. Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994). In it
the algorithms cost:

* ring: 2 (W-1) alpha + 2 (W-1)/W n/beta. P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters
  of workstations", J. Parallel Distrib. Comput. 69, 2009.
* two trees: 2 ceil(log2 W) alpha + 2 n/beta. P. Sanders, J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth
  broadcast, reduction and scan", Parallel Computing 35, 2009; NCCL has them since 2.4. Pipelining is taken as perfect.
* exchange, which `--reduction exact` does: an all-to-all of slices, 1/W of the tensor to each rank, then an all-gather
  of the summed slices: (W-1) alpha + (W-1)/W n/beta each. R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of
  collective communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005, sections 4.1 and 4.3.
  One subtree a rank: shards = ranks, or ranks times a power of two.
* two levels: within a machine of g ranks a reduce-scatter and at the end an all-gather, in between each rank sums its
  1/g of the tensor with its fellows of the other machines. M. Cho et al., "BlueConnect", IBM J. Res. Dev. 63, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["ring", "two trees", "exchange"]


@dataclass(frozen=True, slots=True)
class Link:
    """One rank's way to the others: `latency` in seconds a message, `bandwidth` in bytes/s in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Machines:
    """`ranks` a machine, joined by `inside`; machines are joined by `between`, of which each rank has one."""

    ranks: int
    inside: Link
    between: Link


def ring(ranks: int, size: float, link: Link) -> float:
    """Seconds of a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) * link.latency + 2 * _others(ranks) * size / link.bandwidth


def two_trees(ranks: int, size: float, link: Link) -> float:
    """Seconds of an all-reduce over two complementary binary trees."""
    if ranks == 1:
        return 0.0
    return 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth


def exchange(ranks: int, size: float, link: Link) -> float:
    """Seconds of the all-to-all and all-gather of `--reduction exact`: a ring's bytes, and as many messages."""
    return 2 * ((ranks - 1) * link.latency + _others(ranks) * size / link.bandwidth)


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


_COSTS = {"ring": ring, "two trees": two_trees, "exchange": exchange}


def all_reduce(ranks: int, size: float, machines: Machines, *, exact: bool) -> tuple[float, Algorithm]:
    """Seconds for `size` bytes on `ranks` ranks, and how: the fastest known way, or the exact one.

    The exact sum treats all ranks alike, so its slowest link sets the pace once there are several machines.
    """
    if ranks == 1:
        return 0.0, "exchange" if exact else "ring"
    alone = ranks <= machines.ranks
    if exact:
        return exchange(ranks, size, machines.inside if alone else machines.between), "exchange"
    ways: list[Algorithm] = ["ring", "two trees"]
    if alone:
        return min((_COSTS[way](ranks, size, machines.inside), way) for way in ways)
    nodes, width = math.ceil(ranks / machines.ranks), machines.ranks
    within = ring(width, size, machines.inside)  # a reduce-scatter and an all-gather are one ring all-reduce
    flat = [(_COSTS[way](ranks, size, machines.between), way) for way in ways]
    levels = [(within + _COSTS[way](nodes, size / width, machines.between), way) for way in ways]
    return min(flat + levels)


@dataclass(frozen=True, slots=True)
class Exposed:
    """Seconds of a step's communication: all of it, and what no computation hides."""

    total: float
    exposed: float
    algorithm: Algorithm


def exposed(ranks: int, size: float, bucket: float, backward: float, machines: Machines, *, exact: bool) -> Exposed:
    """Communication in `bucket`s of bytes that starts while the backward pass (`backward` seconds) goes on.

    As S. Li et al., "PyTorch Distributed: experiences on accelerating data parallel training", VLDB 13, 2020: gradients
    become ready at an even pace, buckets are sent one after the other, and nothing is left that could hide the last.
    """
    count = max(1, math.ceil(size / bucket)) if size else 1
    one, algorithm = all_reduce(ranks, size / count, machines, exact=exact)
    # a bucket waits for its gradients or, where sending takes longer, for the one before
    sent = max(backward, backward / count + (count - 1) * one) + one
    return Exposed(count * one, max(0.0, sent - backward), algorithm)
