"""Addresses that processes listen on or dial: `host:port`, `[::1]:port` or `unix:/path`."""

from __future__ import annotations

import ipaddress

UNIX = "unix:"
ANY_HOST = ("0.0.0.0", "::")
"""To listen on every address of this host."""


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of a TCP address. Raises ValueError."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isdecimal() or int(port) > 65535 or (":" in bare and bare == host):
        raise ValueError(f"an address is host:port, [IPv6]:port or unix:/path, not {address!r}")
    return bare, int(port)


def check_address(address: str) -> None:
    """Raises ValueError when it is none of the three forms."""
    if not address.startswith(UNIX):
        split_address(address)
    elif address == UNIX:
        raise ValueError("unix: needs a path behind it")


def check_port(what: str, port: int) -> None:
    """Raises ValueError when there is no such port; 0 is one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"{what} must be between 0 and 65535, not {port}")


def host_of(address: str) -> str | None:
    """Host of a TCP address, None for a Unix socket. Raises ValueError."""
    return None if address.startswith(UNIX) else split_address(address)[0]


def is_local(address: str) -> bool:
    """Only processes of this machine reach it. Raises ValueError."""
    host = host_of(address)
    return host is None or is_loopback(host)


def is_loopback(host: str) -> bool:
    """Only processes of this machine reach the host's address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name: no telling what it resolves to
        return False


def named_address(text: str) -> tuple[str, str]:
    """`NAME=ADDRESS` or `ADDRESS`, which is its own name, as (name, address). Raises ValueError."""
    name, equals, address = text.partition("=")
    if not equals:
        name = address = text
    if not name:
        raise ValueError(f"a name is missing in {text!r}")
    check_address(address)
    return name, address
