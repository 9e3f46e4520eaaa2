"""Frames over plain sockets: written from the pool, read straight into the pool.

A frame is one gathering write of the blocks' own memory, and one scattering read fills as many
pieces as have arrived, so each byte is copied once by the kernel on each side. With TLS, OpenSSL
encrypts from the pool and decrypts into it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import TYPE_CHECKING

from quire.cluster.tls import tls_context
from quire.transfer.frames import ENTRY_BYTES, MAX_BODY_BYTES, MAX_ENTRIES, FrameError
from quire.transfer.sockets import (
    BLOCKED,
    connected,
    join_address,
    listening,
    secured,
    split_address,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Channel
    from quire.transfer.intake import Intake

logger = logging.getLogger(__name__)

MAX_READS = 16
"""In a row; then the loop's other callbacks have their turn."""
LOW_WATER_BYTES = 256 << 10
"""In the middle of a frame the loop sleeps until so much has arrived."""
RETRY_S = 0.5
"""Between two tries to accept, when the process has no descriptor left."""


class TcpChannel:
    """One connected, non-blocking socket."""

    frame_bytes = MAX_BODY_BYTES - MAX_ENTRIES * ENTRY_BYTES
    frames_at_once = 1

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._loop = asyncio.get_running_loop()
        self._intake: Intake | None = None
        self._closed: Callable[[str], None] | None = None
        self._why = ""
        """It is closed, and why."""
        self._leaving: list[memoryview] = []
        """What the kernel does not have yet."""
        self._flushed = asyncio.Event()
        self._low_water = 1

    # ---- Channel

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake from now on."""
        self._intake, self._closed = intake, closed
        if self._why:
            self._loop.call_soon(closed, self._why)
            return
        self._loop.add_reader(self._sock, self._read)
        self._loop.call_soon(self._read)  # a TLS handshake may have read ahead

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame; returns when the kernel has all of it."""
        self._put(memoryview(head), *parts)
        if self._leaving:
            self._flushed.clear()
            await self._flushed.wait()

    def post(self, frame: bytes) -> None:
        """Send a small frame without waiting."""
        self._put(memoryview(frame))

    def close(self) -> None:
        """End the connection."""
        self._end("closed here")

    # ---- writing

    def _put(self, *views: memoryview) -> None:
        if self._why:
            return
        is_waiting = bool(self._leaving)
        self._leaving += views
        if not is_waiting:
            self._write()
            if self._leaving:
                self._loop.add_writer(self._sock, self._write)

    def _write(self) -> None:
        """Give the kernel as much as it takes."""
        try:
            while self._leaving:
                # Of TLS one piece at a time: it has no gathering write.
                self._forget(
                    self._sock.send(self._leaving[0])
                    if self._is_tls
                    else self._sock.sendmsg(self._leaving)
                )
        except BLOCKED:
            return
        except OSError as error:
            self._end(str(error))
            return
        self._loop.remove_writer(self._sock)
        self._flushed.set()

    def _forget(self, count: int) -> None:
        """So many bytes of `_leaving` are with the kernel."""
        for number, view in enumerate(self._leaving):
            if count < len(view):
                self._leaving[: number + 1] = [view[count:]]
                return
            count -= len(view)
        self._leaving.clear()

    # ---- reading

    def _read(self) -> None:
        try:
            for _ in range(MAX_READS):
                if self._why or not self._read_once():
                    return
            self._loop.call_soon(self._read)  # what TLS has decrypted does not wake the loop
        except BLOCKED:
            self._sleep()
        except (FrameError, OSError) as error:
            self._end(str(error) or type(error).__name__)

    def _read_once(self) -> bool:
        """Whether there may be more. Raises BLOCKED, OSError, FrameError."""
        assert self._intake is not None
        buffers = self._intake.buffers()
        room = 0
        if self._is_tls:
            count = self._sock.recv_into(buffers[0])
        else:
            count, room = self._sock.recvmsg_into(buffers)[0], sum(map(len, buffers))
        if not count:
            self._end("the peer ended the connection")
            return False
        self._intake.advance(count)
        if count < room:
            self._sleep()
        return count >= room

    def _sleep(self) -> None:
        """Before the loop waits for more: have it woken for what is worth it, not each packet."""
        assert self._intake is not None
        low_water = max(min(self._intake.missing, LOW_WATER_BYTES), 1)
        if low_water != self._low_water and not (self._is_tls or self._why):
            self._low_water = low_water
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)

    def _end(self, why: str) -> None:
        if self._why:
            return
        self._why = why
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._leaving.clear()
        self._flushed.set()
        if self._closed is not None:
            self._loop.call_soon(self._closed, why)


class TcpTransport:
    """Channels over sockets, with mutual TLS when the config names certificates."""

    name = "tcp"

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Listen on the configured host and port."""
        config = self._config
        tls = tls_context(config, server=True)
        server = listening(config.kv_host, config.kv_tcp_port)

        async def welcome(sock: socket.socket) -> None:
            try:
                async with asyncio.timeout(config.kv_connect_timeout_s):
                    channel = TcpChannel(await secured(sock, tls))
            except (OSError, TimeoutError) as error:
                logger.warning("KV connection refused: %s", error or "no TLS handshake in time")
            else:
                accept(channel)

        async def serve() -> None:
            with server:
                while True:
                    try:
                        sock, _ = await asyncio.get_running_loop().sock_accept(server)
                    except OSError as error:
                        logger.warning("KV connection not accepted: %s", error)
                        await asyncio.sleep(RETRY_S)
                    else:
                        self._own(welcome(sock))

        self._own(serve())
        port = server.getsockname()[1]
        return join_address(config.kv_advertised_host or config.kv_host, port)

    async def dial(self, address: str) -> Channel:
        """Connect. Raises OSError."""
        host, port = split_address(address)
        tls = tls_context(self._config, server=False, by_name=True)
        return TcpChannel(await secured(await connected(host, port), tls, host))

    async def close(self) -> None:
        """Stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
