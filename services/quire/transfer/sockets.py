"""Connected, non-blocking sockets, to others or from them, with mutual TLS or without."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BACKLOG = 128
BLOCKED = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""Raised by a call on a non-blocking socket that has to wait."""


def join_address(host: str, port: int) -> str:
    """host:port, IPv6 hosts in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Raises OSError on anything but host:port."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise OSError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host, port), family=family, backlog=BACKLOG)
    server.setblocking(False)
    return server


async def connected(host: str, port: int) -> socket.socket:
    """A connection to the first of the host's addresses that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    problem = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, place)
        except OSError as error:
            sock.close()
            problem = error
        except asyncio.CancelledError:
            sock.close()
            raise
        else:
            return sock
    raise problem


async def secured(
    sock: socket.socket, context: ssl.SSLContext | None, peer: str | None = None
) -> socket.socket:
    """The connection after a TLS handshake, as the side that connected to `peer` or, without one,
    that was connected to. Takes the socket over. Raises OSError."""
    if context is None:
        return sock
    loop = asyncio.get_running_loop()
    tls = context.wrap_socket(
        sock, server_side=peer is None, server_hostname=peer, do_handshake_on_connect=False
    )
    try:
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(loop.add_reader, loop.remove_reader, tls)
            except ssl.SSLWantWriteError:
                await _ready(loop.add_writer, loop.remove_writer, tls)
            else:
                return tls
    except (OSError, asyncio.CancelledError):
        tls.close()
        raise


async def _ready(add: Callable[..., None], remove: Callable[..., object], sock: object) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add(sock, wake)
    try:
        await future
    finally:
        remove(sock)
