"""Ranks that are threads of the test: they speak through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from samestep.train.parallel.shared_memory import Arena

DEADLINE = 60.0


class Seated:
    """One rank's place at the table."""

    def __init__(self, rank: int, said: list[list[bytes]], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(said)
        self._said = said
        self._barrier = barrier

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self._said[self.rank].append(data)
        self._barrier.wait(DEADLINE)
        heard = [said[-1] for said in self._said]
        self._barrier.wait(DEADLINE)
        return heard


def each_rank(ranks: int, act: Callable[[Seated], Any]) -> list[Any]:
    """What `act` returns on each rank, all at once."""
    said: list[list[bytes]] = [[] for _ in range(ranks)]
    barrier = threading.Barrier(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        return [
            done.result(DEADLINE)
            for done in [threads.submit(act, Seated(rank, said, barrier)) for rank in range(ranks)]
        ]


def together(found: list[Arena], act: Callable[[Arena], Any]) -> list[Any]:
    """What `act` returns for each arena, all at once."""
    return each_rank(len(found), lambda seated: act(found[seated.rank]))
