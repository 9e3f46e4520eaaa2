"""A proxy between two real processes that loses, repeats, delays and damages what it carries.

    sender ──▶ 127.0.0.2:port ──▶ 127.0.0.1:port, the receiver, which gives the former as its own

Of the tcp transport, and of the notes of nixl, it knows the frames, and a plan decides about each;
of gRPC, HTTP/2, it damages bytes and holds them up.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from quire.transfer.frames import HEADER_BYTES, unpack

if TYPE_CHECKING:
    from quire.transfer.faults import FaultPlan

HERE, THERE = "127.0.0.2", "127.0.0.1"
CHUNK = 64 << 10


class Proxy:
    """Carries both ways of each connection."""

    def __init__(self, plan: FaultPlan, port: int, *, frames: bool) -> None:
        self.plan, self.port = plan, port
        self._carry = self._carry_frames if frames else self._carry_bytes
        self.num_connections = 0
        self.writers: set[asyncio.StreamWriter] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection; both ends of it end together."""
        self.num_connections += 1
        writers = {writer}
        self.writers |= writers
        try:
            there, onward = await asyncio.open_connection(THERE, self.port)
            writers.add(onward)
            ways = [self._carry(reader, onward), self._carry(there, writer)]
            tasks = [asyncio.create_task(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            pass  # nobody is there any more
        finally:
            self.writers -= writers
            for one in writers:
                one.transport.abort()

    async def _carry_frames(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        held = b""
        while True:
            head = await reader.readexactly(HEADER_BYTES)
            header = unpack(head)
            frame = head + await reader.readexactly(header.length)
            match self.plan.pick(header.kind):
                case "drop":
                    continue
                case "duplicate":
                    frame += frame
                case "reorder" if not held:
                    held = frame
                    continue
                case "corrupt" if header.length:
                    frame = self._damaged(frame, HEADER_BYTES)
                case "delay":
                    await asyncio.sleep(self.plan.delay_s)
            writer.write(frame + held)
            held = b""
            await writer.drain()

    async def _carry_bytes(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        plan = self.plan
        while data := await reader.read(CHUNK):
            if plan.random.random() < plan.delay:
                plan.done["delay"] += 1
                await asyncio.sleep(plan.delay_s)
            if len(data) > CHUNK // 8 and plan.random.random() < plan.corrupt:  # blocks
                plan.done["corrupt"] += 1
                data = self._damaged(data, 0)
            writer.write(data)
            await writer.drain()

    def _damaged(self, data: bytes, first: int) -> bytes:
        damaged = bytearray(data)
        damaged[self.plan.random.randrange(first, len(data))] ^= 1
        return bytes(damaged)


@asynccontextmanager
async def proxy(plan: FaultPlan, port: int, *, frames: bool):
    """In front of whoever listens at the port."""
    carrier = Proxy(plan, port, frames=frames)
    server = await asyncio.start_server(carrier.accept, HERE, port)
    try:
        yield carrier
    finally:
        server.close()
        for writer in carrier.writers:
            writer.transport.abort()
