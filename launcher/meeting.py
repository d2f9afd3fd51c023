"""Ports on which the ranks of one generation meet; every generation gets fresh ones.

A recipe's store gets a listening socket that we opened on loopback, so no second program can take its port and nobody
outside this machine can reach it. Scripts that open MASTER_PORT themselves get a port number that nothing listens on.
"""

from __future__ import annotations

import errno
import secrets
import socket
from pathlib import Path

from samestep.launcher.contract import UsageError
from samestep.launcher.host import port_holder
from samestep.launcher.plan import Meeting

LOOPBACK = "127.0.0.1"
_LOWEST_PORT = 20000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 100


def preview(master_addr: str, master_port: int | None) -> Meeting:
    """A meeting without a store socket, for showing a plan.

    Raises:
        UsageError: `master_port` is taken.
    """
    return Meeting(master_addr=master_addr, master_port=_master_port(master_port))


def open_store(master_addr: str, master_port: int | None, listen_on: str = "") -> tuple[Meeting, socket.socket]:
    """A meeting for one generation, and its store socket, which the caller closes once rank zero has it.

    The socket is on loopback, or on the address that `listen_on` says.

    Raises:
        UsageError: `master_port` is taken.
    """
    port = _master_port(master_port)
    family = socket.AF_INET6 if ":" in listen_on else socket.AF_INET
    listener = socket.create_server((listen_on or LOOPBACK, 0), family=family, backlog=1024)
    return Meeting(master_addr, port, listener.getsockname()[1], listener.fileno(), store_addr=listen_on), listener


def _master_port(wanted: int | None) -> int:
    if not wanted:
        return _free_port()
    if not _is_free(wanted):
        raise UsageError(
            f"--master-port is expected to be free, but {wanted} is taken by {port_holder(wanted)}",
            "leave it out for a free port",
        )
    return wanted


def _free_port() -> int:
    """A port below the ephemeral range: the system never hands those out by itself, so it is still free when used."""
    try:
        highest = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        highest = 32768
    for _ in range(_ATTEMPTS if highest > _LOWEST_PORT else 0):
        port = _LOWEST_PORT + secrets.randbelow(highest - _LOWEST_PORT)
        if _is_free(port):
            return port
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    """Whether a store could listen on `port` on every address, which is what torch's own store does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: TIME_WAIT is no obstacle
        try:
            probe.bind(("", port))  # which fails where somebody listens; we ourselves never do, on all addresses
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
