"""Memory of all ranks of one host that each of them sees, and a way to wait for one another beside it.

Ranks on one host need no network to add up gradients: gloo moves them through loopback sockets and its own threads,
which took five to eight times as long here, for 4 KB to 2.4 MB between two ranks. A rank's memory is anonymous
(memfd_create) and travels as a descriptor over a Unix socket of the abstract namespace, so that nothing has a name that
could be left behind. The same sockets then carry one word a meeting, which says what it is for, and tell of a rank that
has died.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import os
import secrets
import socket
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

MEMORY_BYTES = 64 << 20  # of a rank; pages that are never written take none
LETTER_BYTES = 256 << 10  # that `gather` takes
MOST_RANKS = 64  # of a host: each pair has a socket
_HELLO = struct.Struct("=16sI")  # token, rank
_WORD = struct.Struct("=I")
_LINK_SECONDS = 30.0


class Speaks(Protocol):
    """What meeting for the first time needs of a process group."""

    rank: int
    world_size: int

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Any bytes of each rank."""


class Arena:
    """This rank's memory and that of its peers.

    Attributes:
        memory: by rank, uint8; only its own rank writes there.
        size: bytes of each that belong to whoever shares them out; behind them is a place for letters.
        meetings: so far.
    """

    def __init__(self, rank: int, memory: list[Tensor], peers: dict[int, socket.socket], patience: int) -> None:
        self.rank = rank
        self.memory = memory
        self.size = len(memory[rank]) - 2 * LETTER_BYTES
        self.meetings = 0
        self._turn = 0  # of two places for letters: who has met about the second one has read the first
        self._peers = peers
        self._patience = patience
        for peer in peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", patience, 0))
        _open.add(self)

    def meet(self, *about: int) -> None:
        """Wait until every rank is here; what each has written before can be read then. A collective.

        Args:
            about: what the meeting is for, the same numbers on every rank.

        Raises:
            RuntimeError: a rank has died, did not come in time, or came for something else.
        """
        self.meetings += 1
        word = _WORD.pack(hash((self.meetings, *about)) & 0xFFFFFFFF)
        try:
            for peer in self._peers.values():
                peer.send(word)
            for rank, peer in self._peers.items():
                heard = peer.recv(_WORD.size, socket.MSG_WAITALL)
                if not heard:
                    raise RuntimeError(f"Connection closed by peer: rank {rank}")
                if heard != word:
                    raise RuntimeError(f"mismatch between collectives: rank {rank} is in another one than this rank")
        except BlockingIOError as error:
            raise RuntimeError(f"a rank did not come within {self._patience} s") from error
        except ConnectionError as error:
            raise RuntimeError(f"Connection closed by peer: {error}") from error

    def gather(self, tensor: Tensor) -> Tensor:
        """Equal-shaped tensors of LETTER_BYTES at most, of all ranks, stacked. A collective."""
        begin, self._turn = self.size + self._turn * LETTER_BYTES, 1 - self._turn
        size = tensor.numel() * tensor.element_size()
        letters = [memory[begin : begin + size].view(tensor.dtype).view(tensor.shape) for memory in self.memory]
        letters[self.rank].copy_(tensor)
        self.meet(size)
        return torch.stack(letters)

    def close(self) -> None:
        """Leave the others; they notice."""
        for peer in self._peers.values():
            peer.close()


_open: weakref.WeakSet[Arena] = weakref.WeakSet()


def _leave_in_child() -> None:
    """A data loading process that held the sockets open would hide the death of its rank."""
    for arena in list(_open):
        arena.close()


os.register_at_fork(after_in_child=_leave_in_child)


def open_arena(group: Speaks, patience: int, size: int = MEMORY_BYTES) -> Arena | None:
    """The arena of all ranks, or None on all of them where they are not on one Linux host. A collective.

    Args:
        group: through which ranks tell where they are.
        patience: seconds for which a rank waits for another one that lives.
        size: bytes of each rank's memory, beside those for letters.
    """
    with contextlib.ExitStack() as opened:
        seat = _Seat.take(size, opened) if group.world_size <= MOST_RANKS else None
        rows = [json.loads(row) for row in group.gather_bytes(json.dumps(seat.about() if seat else {}).encode())]
        if seat is None or any(row.get("host") != rows[0].get("host") for row in rows) or not rows[0]:
            return None
        arena = None
        with contextlib.suppress(OSError, ValueError):
            arena = Arena(group.rank, *_linked(group.rank, rows, seat, opened), patience)
        if all(group.gather_bytes(b"1" if arena else b"")):
            return arena
        if arena:
            arena.close()
        return None


@dataclass(frozen=True, slots=True)
class _Seat:
    """What a rank brings along; closed once all are linked."""

    listener: socket.socket
    memory: int  # descriptor
    token: bytes
    size: int

    @classmethod
    def take(cls, size: int, opened: contextlib.ExitStack) -> _Seat | None:
        """None where the system has no such memory or sockets."""
        token = secrets.token_bytes(16)
        try:
            memory = os.memfd_create("samestep", os.MFD_CLOEXEC)
            opened.callback(os.close, memory)
            os.ftruncate(memory, size + 2 * LETTER_BYTES)
            listener = opened.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind("")  # the kernel picks a free abstract name (unix(7), autobind)
            listener.listen(MOST_RANKS)
        except (OSError, AttributeError):
            return None
        return cls(listener, memory, token, size + 2 * LETTER_BYTES)

    def about(self) -> dict[str, str]:
        """What the other ranks need to know; `host` is equal where memory can be shared."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            network = Path("/proc/self/ns/net").stat().st_ino
        except OSError:
            return {}
        name = bytes(self.listener.getsockname())
        return {"host": f"{boot} {network} {os.getuid()}", "name": name.hex(), "token": self.token.hex()}


def _linked(
    rank: int, rows: Sequence[dict[str, str]], seat: _Seat, opened: contextlib.ExitStack
) -> tuple[list[Tensor], dict[int, socket.socket]]:
    """Memory of all ranks, and sockets to the others: to lower ones as their client, to higher ones as their server.

    Raises:
        OSError: somebody did not come in time.
        ValueError: somebody else came.
    """
    ranks, token = len(rows), bytes.fromhex(rows[rank]["token"])
    peers: dict[int, socket.socket] = {}
    descriptors = {rank: seat.memory}
    seat.listener.settimeout(_LINK_SECONDS)
    with contextlib.ExitStack() as unfinished:
        for other in range(rank):
            peer = peers[other] = unfinished.enter_context(socket.socket(socket.AF_UNIX))
            peer.settimeout(_LINK_SECONDS)
            peer.connect(bytes.fromhex(rows[other]["name"]))
            socket.send_fds(peer, [_HELLO.pack(bytes.fromhex(rows[other]["token"]), rank)], [seat.memory])
        while len(peers) < ranks - 1:
            peer = unfinished.enter_context(seat.listener.accept()[0])
            peer.settimeout(_LINK_SECONDS)
            said, found = _receive(peer, _HELLO.size, opened)
            claimed, other = _HELLO.unpack(said)
            if hmac.compare_digest(claimed, token) and rank < other < ranks and other not in peers:
                peers[other], descriptors[other] = peer, found
                socket.send_fds(peer, [b"."], [seat.memory])
            else:
                peer.close()
        for other in range(rank):
            _, descriptors[other] = _receive(peers[other], 1, opened)
        memory = [_mapped(descriptors[other], seat.size) for other in range(ranks)]
        unfinished.pop_all()
    return memory, dict(sorted(peers.items()))


def _receive(peer: socket.socket, size: int, opened: contextlib.ExitStack) -> tuple[bytes, int]:
    said, found, _, _ = socket.recv_fds(peer, size, 1)
    for descriptor in found:
        opened.callback(os.close, descriptor)
    if len(said) != size or len(found) != 1:
        raise ValueError("a peer is expected to send its memory, but it sent something else")
    return said, found[0]


def _mapped(descriptor: int, size: int) -> Tensor:
    memory = mmap.mmap(descriptor, size)
    memory.madvise(mmap.MADV_DONTFORK)  # what a rank forks has no business there
    return torch.frombuffer(memory, dtype=torch.uint8)
