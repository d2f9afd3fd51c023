"""Conversations between launchers: how they end."""

from __future__ import annotations

import socket

import pytest

from samestep.launcher.cluster.hub import Hub


def test_peers_that_do_not_listen_share_the_moment_that_one_is_given_at_the_end() -> None:
    hub = Hub(b"key", "head", interval=1.0, silence=10.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = [socket.create_connection(server.getsockname()) for _ in range(3)]
        peers = [hub.add(server.accept()[0]) for _ in far]
    seconds = iter((10.0, 10.0, 10.6, 12.0))  # when asked to end, and before each of them
    hub._clock = lambda: next(seconds)
    hub.close()
    assert [peer.socket.gettimeout() for peer in peers] == [1.0, pytest.approx(0.4), 0.0]
    for end in far:
        end.close()
