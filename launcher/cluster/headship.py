"""Whether this launcher is the head of its run: who can listen where the others will call."""

from __future__ import annotations

import errno
import socket

from samestep.launcher import interfaces
from samestep.launcher.cluster.layout import Layout
from samestep.launcher.contract import UsageError


def open_head(place: Layout) -> socket.socket | None:
    """The socket on which the head listens, on the one address chosen; None where another machine is the head.

    Raises:
        UsageError: this is to be the head, but can't listen there.
    """
    if place.node_rank not in (None, 0):
        return None
    if place.node_rank is None and interfaces.resolve(place.address) not in interfaces.own_addresses():
        return None
    address = interfaces.reachable_address(place.address or place.source)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, place.port), family=family, backlog=128)
    except OSError as error:
        if place.node_rank is None and error.errno == errno.EADDRINUSE:
            return None  # another launcher of this machine came first
        option = "--rdzv-endpoint" if place.node_rank is None else "--master-port"
        raise UsageError(
            f"{option} is expected to be free on {address}, but {place.port} is not ({error.strerror})",
            "choose another port, the same on all machines",
        ) from None
