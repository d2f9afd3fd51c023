"""Arenas of ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from samestep.train.parallel.shared_memory import Arena, open_arena
from tests.train.parallel.thread_ranks import each_rank


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A process that has run one operation on several threads hangs what it forks later."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arenas() -> Iterator[Callable[..., list[Arena]]]:
    """`arenas(ranks, patience=30, size=1 << 20)`: one for each rank, linked; closed when the test is over."""
    opened: list[Arena] = []

    def link(ranks: int, patience: int = 30, size: int = 1 << 20) -> list[Arena]:
        found: list[Arena] = each_rank(ranks, lambda seated: open_arena(seated, patience, size))
        assert all(found)
        opened.extend(found)
        return found

    yield link
    for arena in opened:
        arena.close()
