"""Which of this machine's addresses another machine can reach, and which interface has it."""

from __future__ import annotations

import ipaddress
import socket

from samestep.launcher.contract import UsageError

_ELSEWHERE = ("192.0.2.1", 9)  # reserved for documentation (RFC 5737): a route is looked up, nothing is sent


def own_addresses() -> dict[str, str]:
    """IPv4 and IPv6 addresses of this machine, without zone, and the interface of each."""
    import psutil

    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def resolve(host: str) -> str:
    """First address of `host`, IPv4 if it has one.

    Raises:
        UsageError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"the address {host} is expected to be known here, but is not ({error.strerror or error})",
            "give the machine's IP address instead",
        ) from None
    found.sort(key=lambda item: item[0] != socket.AF_INET)
    return str(found[0][4][0])


def reachable_address(wanted: str = "") -> str:
    """Address under which other machines reach this one: `wanted` if given, that of its name, or the default route's.

    Raises:
        UsageError: `wanted` is not an address of this machine, or there is none but loopback.
    """
    mine = own_addresses()
    if wanted:
        address = resolve(wanted)
        if address not in mine:
            raise UsageError(
                f"MASTER_ADDR is expected to be an address of rank zero's machine, but {wanted} is not",
                f"its addresses are {', '.join(sorted(mine))}",
            )
        return address
    try:
        named = resolve(socket.gethostname())
    except UsageError:
        named = ""
    if named in mine and not named.startswith("127.") and named != "::1":
        return named
    routed = address_toward(*_ELSEWHERE)
    others = [address for address in mine if not ipaddress.ip_address(address).is_loopback]
    others = [address for address in others if not ipaddress.ip_address(address).is_link_local]
    if not routed and len(others) == 1:
        return others[0]
    if not routed:
        raise UsageError(
            "this machine is expected to have one address that others can reach, but has "
            f"{', '.join(sorted(others)) or 'none but loopback'}, and no default route",
            "set MASTER_ADDR (for samestep run: --master-addr) to the address of rank zero's machine",
        )
    return routed


def address_toward(host: str, port: int) -> str:
    """Own address from which `host` would be reached; empty without a route."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port or 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def interface_toward(host: str, port: int) -> str:
    """Name of the interface from which `host` would be reached; empty if it can't be told."""
    return own_addresses().get(address_toward(host, port), "")
