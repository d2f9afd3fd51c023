"""The sockets between launchers: who has called, what they say, and who has fallen silent. Decides nothing."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from samestep.launcher.cluster.link import Link, LinkError, Side

_STRANGER_SECONDS = 10.0  # to prove to know the token
_MOST_STRANGERS = 64
_CHUNK_BYTES = 1 << 16
_LAST_WORDS_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Peer:
    """A launcher at the other end of a connection."""

    socket: socket.socket
    link: Link
    heard: float  # clock when it last said anything
    address: str = ""
    writing: bool = False
    facts: dict[str, Any] = field(default_factory=dict)  # free for the owner of the hub


@dataclass(frozen=True, slots=True)
class Said:
    """A message, with a good mac."""

    peer: Peer
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gone:
    """The connection is over; `why` is for people."""

    peer: Peer
    why: str


class Hub:
    """Any number of connections behind one descriptor that is readable when `pump` has something to do."""

    def __init__(self, key: bytes, side: Side, interval: float, silence: float) -> None:
        self._key, self._side = key, side
        self._interval, self._silence = interval, silence
        self._clock: Callable[[], float] = time.monotonic
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._peers: list[Peer] = []
        self._spoke = self._clock()

    def fileno(self) -> int:
        """To be waited for together with other things."""
        return int(self._selector.fileno())  # epoll and kqueue have one

    def listen(self, listener: socket.socket) -> None:
        """Take calls."""
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def add(self, connection: socket.socket) -> Peer:
        """Talk over a connection."""
        connection.setblocking(False)
        self._keep_alive(connection)
        address = str(connection.getpeername()[0])
        peer = Peer(connection, Link(self._key, self._side), self._clock(), address)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._flush(peer)
        return peer

    def say(self, peer: Peer, message: dict[str, Any]) -> None:
        """Send without waiting."""
        peer.link.say(message)
        self._flush(peer)

    def pump(self, seconds: float = 0.0) -> list[Said | Gone]:
        """Take and send what there is; waits up to `seconds` for the first of it."""
        found: list[Said | Gone] = []
        for key, events in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                found += self._read(key.data)
        now = self._clock()
        if now - self._spoke >= self._interval:
            self._spoke = now
            for peer in self._peers:
                self.say(peer, {"kind": "alive"})
        for peer in list(self._peers):
            found += self._judge(peer, now)
        return found

    def drop(self, peer: Peer, seconds: float = _LAST_WORDS_SECONDS) -> None:
        """End a conversation; what is still to be sent is given a moment."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        with contextlib.suppress(OSError):
            peer.socket.settimeout(seconds)
            peer.socket.sendall(peer.link.out)
        peer.socket.close()

    def close(self) -> None:
        """End all of them, within the moment that one is given."""
        end = self._clock() + _LAST_WORDS_SECONDS
        for peer in list(self._peers):
            self.drop(peer, max(0.0, end - self._clock()))
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            if sum(not peer.link.authenticated for peer in self._peers) >= _MOST_STRANGERS:
                connection.close()
            else:
                self.add(connection)

    def _read(self, peer: Peer) -> list[Said | Gone]:
        try:
            data = peer.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            return self._lose(peer, error.strerror or str(error))
        if not data:
            return self._lose(peer, "the connection was closed")
        try:
            messages = peer.link.feed(data)
        except LinkError as error:
            return self._lose(peer, str(error))
        if peer.link.authenticated:
            peer.heard = self._clock()
        self._flush(peer)
        return [Said(peer, message) for message in messages if message.get("kind") != "alive"]

    def _judge(self, peer: Peer, now: float) -> list[Said | Gone]:
        limit = self._silence if peer.link.authenticated else _STRANGER_SECONDS
        if now - peer.heard > limit:
            return self._lose(peer, f"no sign of life for {limit:.0f} s")
        return []

    def _lose(self, peer: Peer, why: str) -> list[Said | Gone]:
        if peer not in self._peers:
            return []
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()
        return [Gone(peer, why)]

    def _flush(self, peer: Peer) -> None:
        out = peer.link.out
        with contextlib.suppress(OSError):  # a broken connection is told by the next read
            while out:
                del out[: peer.socket.send(out)]
        if peer in self._peers and bool(out) != peer.writing:
            peer.writing = bool(out)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.writing else 0)
            self._selector.modify(peer.socket, wanted, peer)

    def _keep_alive(self, connection: socket.socket) -> None:
        """The kernel gives up after the same silence, also with data that is not acknowledged."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._silence * 1000))
