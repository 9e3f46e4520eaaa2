"""Frames over plain sockets: written from the pool, read straight into the pool.

On uvloop a frame is one gathering write of the block's own memory and a read lands in the block's
own memory (a buffered protocol), so each byte is copied once by the kernel on each side. Plain
asyncio works too, with one more copy. TLS by the loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from quire.cluster.tls import tls_context
from quire.transfer.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Channel
    from quire.transfer.intake import Intake

BACKLOG = 128


class TcpChannel(asyncio.BufferedProtocol):
    """One socket."""

    def __init__(self, accept: Callable[[Channel], None] | None = None) -> None:
        self._accept = accept
        self._transport: asyncio.Transport | None = None
        self._intake: Intake | None = None
        self._closed: Callable[[str], None] | None = None
        self._why = "the peer ended the connection"
        self._flushed = asyncio.Event()
        self._flushed.set()

    # ---- Channel

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake from now on."""
        self._intake, self._closed = intake, closed
        if self._transport is None:
            closed(self._why)
        else:
            self._transport.resume_reading()

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame; returns when the kernel has all of it."""
        if self._transport is None or self._transport.is_closing():
            return
        if parts:
            self._transport.writelines((head, *parts))
        else:
            self._transport.write(head)
        if not self._flushed.is_set():
            await self._flushed.wait()

    def post(self, frame: bytes) -> None:
        """Send a small frame without waiting."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ---- BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        self._transport = transport = cast("asyncio.Transport", transport)
        # Nothing may stay queued in user space: then a flushed frame is one that is not read again.
        transport.set_write_buffer_limits(high=0)
        if self._accept is None:
            transport.pause_reading()  # until start()
        else:
            self._accept(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        assert self._intake is not None
        return self._intake.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """They came."""
        assert self._intake is not None
        try:
            self._intake.advance(nbytes)
        except FrameError as error:
            self._why = str(error)
            self.close()

    def eof_received(self) -> None:
        """The peer ended its side: so does this one."""

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self._flushed.clear()

    def resume_writing(self) -> None:
        """The kernel has everything."""
        self._flushed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self._transport = None
        self._flushed.set()
        if exc is not None:
            self._why = str(exc)
        if self._closed is not None:
            self._closed(self._why)


class TcpTransport:
    """Channels over sockets, with mutual TLS when the config names certificates."""

    name = "tcp"

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._server: asyncio.Server | None = None

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Listen on the configured host and port."""
        config = self._config
        self._server = await asyncio.get_running_loop().create_server(
            lambda: TcpChannel(accept),
            config.kv_host,
            config.kv_tcp_port,
            backlog=BACKLOG,
            ssl=tls_context(config, server=True),
        )
        port = self._server.sockets[0].getsockname()[1]
        return join_address(config.kv_advertised_host or config.kv_host, port)

    async def dial(self, address: str) -> Channel:
        """Connect. Raises OSError."""
        host, port = split_address(address)
        tls = tls_context(self._config, server=False)
        _, channel = await asyncio.get_running_loop().create_connection(
            TcpChannel, host, port, ssl=tls
        )
        return channel

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


def join_address(host: str, port: int) -> str:
    """host:port, IPv6 hosts in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Raises OSError on anything but host:port."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise OSError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
