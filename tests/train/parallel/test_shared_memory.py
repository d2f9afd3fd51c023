"""Memory that ranks of a host share: who gets in, what is read there, and that a death is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch

from samestep.train.parallel import shared_memory as under_test
from samestep.train.parallel.shared_memory import LETTER_BYTES, Arena, open_arena
from tests.train.parallel.thread_ranks import Seated, each_rank, together

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared on Linux only")
pytestmark = needs_memfd


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_each_rank_reads_what_the_others_wrote_before_they_met(ranks, arenas):
    def write_and_read(arena: Arena) -> list[int]:
        arena.memory[arena.rank][:100] = arena.rank + 1
        arena.meet()
        return [int(memory[:100].sum()) for memory in arena.memory]

    assert together(arenas(ranks), write_and_read) == [[100 * (rank + 1) for rank in range(ranks)]] * ranks


@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (LETTER_BYTES // 8,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])
def test_gathers_come_in_order_however_fast_they_follow(shape, dtype, arenas):
    def gather(arena: Arena) -> list[torch.Tensor]:
        return [arena.gather(torch.full(shape, (7 * turn + arena.rank) % 2, dtype=dtype)) for turn in range(50)]

    expected = [
        torch.stack([torch.full(shape, (7 * turn + rank) % 2, dtype=dtype) for rank in range(3)]) for turn in range(50)
    ]
    for rows in together(arenas(3), gather):
        assert all(torch.equal(mine, right) for mine, right in zip(rows, expected, strict=True))


def test_a_gathered_row_stays_when_the_memory_is_used_again(arenas):
    def gather(arena: Arena) -> list[list[int]]:
        kept = arena.gather(torch.tensor([arena.rank]))
        for _ in range(4):
            arena.gather(torch.tensor([9]))
        return kept.tolist()

    assert together(arenas(2), gather) == [[[0], [1]]] * 2


def test_a_rank_that_is_gone_is_noticed_by_those_who_wait_for_it(arenas):
    def leave_or_wait(arena: Arena) -> None:
        if arena.rank == 1:
            arena.close()
            return
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            arena.meet()

    together(arenas(2), leave_or_wait)


def test_a_connection_that_ends_is_no_word(arenas):
    found = arenas(2)
    found[1]._peers[0].shutdown(socket.SHUT_WR)
    with pytest.raises(RuntimeError, match="Connection closed by peer: rank 1"):
        found[0].meet()


def test_a_forked_child_does_not_keep_the_connection_of_its_parent_open(arenas):
    found = arenas(2)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)  # lives until the test is over
        os._exit(0)
    try:
        found[1].close()
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            found[0].meet()
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_a_rank_that_lives_but_does_not_come_is_waited_for_so_long_only(arenas):
    found = arenas(2, patience=1)
    with pytest.raises(RuntimeError, match="did not come within 1 s"):
        found[0].meet()


def test_ranks_that_meet_for_different_things_are_told_so(arenas):
    def enter(arena: Arena) -> None:
        arena.gather(torch.ones(3))
        with pytest.raises(RuntimeError, match=f"mismatch between collectives: rank {1 - arena.rank} "):
            arena.gather(torch.ones(3 + arena.rank))

    together(arenas(2), enter)


def test_a_rank_that_left_out_a_meeting_is_told_so(arenas):
    found = arenas(2)
    found[1].meetings += 1

    def enter(arena: Arena) -> None:
        with pytest.raises(RuntimeError, match="mismatch between collectives"):
            arena.meet()

    together(found, enter)


def test_ranks_on_several_hosts_have_none(monkeypatch):
    about = under_test._Seat.about
    monkeypatch.setattr(under_test._Seat, "about", lambda seat: about(seat) | {"host": str(id(seat))})
    assert each_rank(2, lambda seated: open_arena(seated, 30)) == [None, None]


def test_nobody_has_one_where_one_rank_gets_no_memory(monkeypatch):
    take = under_test._Seat.take
    calls = iter([False, True])
    monkeypatch.setattr(under_test._Seat, "take", lambda *given: take(*given) if next(calls) else None)
    assert each_rank(2, lambda seated: open_arena(seated, 30)) == [None, None]


def test_nobody_has_one_where_one_rank_can_not_link(monkeypatch):
    mapped = under_test._mapped
    calls = iter([False, True, True, True])

    def failing(descriptor: int, size: int) -> torch.Tensor:
        if next(calls):
            return mapped(descriptor, size)
        raise OSError("no memory")

    monkeypatch.setattr(under_test, "_mapped", failing)
    assert each_rank(2, lambda seated: open_arena(seated, 30)) == [None, None]


def test_more_ranks_than_sockets_are_worth_have_none(monkeypatch):
    monkeypatch.setattr(under_test, "MOST_RANKS", 2)
    assert each_rank(3, lambda seated: open_arena(seated, 30)) == [None] * 3


def test_a_stranger_is_turned_away(monkeypatch):
    """Somebody of the same host connects first and has no token."""
    strangers: list[socket.socket] = []

    class Watched(Seated):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            rows = super().gather_bytes(data)
            if self.rank == 0 and not strangers:
                stranger = socket.socket(socket.AF_UNIX)
                stranger.connect(bytes.fromhex(json.loads(rows[0])["name"]))
                memory = os.memfd_create("stranger")
                socket.send_fds(stranger, [under_test._HELLO.pack(b"x" * 16, 1)], [memory])
                os.close(memory)
                strangers.append(stranger)
            return rows

    def sit(seated: Seated) -> Arena | None:
        return open_arena(Watched(seated.rank, seated._said, seated._barrier), 30, 1 << 20)

    found = each_rank(2, sit)
    assert together(found, lambda arena: arena.gather(torch.tensor(arena.rank)).tolist()) == [[0, 1]] * 2
    together(found, Arena.close)
    with strangers[0]:
        strangers[0].settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert strangers[0].recv(1) == b""


def test_no_descriptor_stays_open_but_the_sockets(arenas):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    found = arenas(3)
    assert descriptors() == before + 6 + 9  # two sockets and three memories each
    together(found, Arena.close)
    assert descriptors() == before + 9


def test_nothing_has_a_name_in_the_file_system(arenas):
    def shared() -> set[str]:  # of this process alone: others come and go in /dev/shm
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        return {words[5] for words in lines if words[1].endswith("s") and len(words) == 6}

    before = shared()
    found = arenas(2)
    assert {name.split(":")[0] for name in shared() - before} <= {"/memfd"}
    assert any(name.startswith("/memfd:samestep") for name in shared())
    assert found
