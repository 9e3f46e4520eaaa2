"""Channels inside one process, for tests and for a single-process P/D engine.

    network = LocalNetwork()
    Endpoint(..., transports=[LocalTransport(network)])     # and another one, on the same network

Each side may have its own event loop and thread. Frames are copied, so a receiver never sees the
sender's memory.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from quire.transfer.base import Unreachable
from quire.transfer.frames import FrameError
from quire.transfer.layout import FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.transfer.base import Channel
    from quire.transfer.intake import Intake


class LocalNetwork:
    """Addresses that transports of this network can dial."""

    def __init__(self) -> None:
        self.listening: dict[str, tuple[asyncio.AbstractEventLoop, Callable[[Channel], None]]] = {}
        self._numbers = itertools.count(1)

    def address(self) -> str:
        """A new one."""
        return f"local:{next(self._numbers)}"


class LocalChannel:
    """One side of a pair."""

    frame_bytes = FRAME_BYTES
    frames_at_once = 1

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.other: LocalChannel | None = None
        self._loop = loop
        self._intake: Intake | None = None
        self._closed: Callable[[str], None] | None = None
        self._early: list[bytes] = []
        self._is_closed = False

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake from now on."""
        self._intake, self._closed = intake, closed
        early, self._early = self._early, []
        for data in early:
            self._deliver(data)

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame, copied."""
        if self.other is not None and not self._is_closed:
            self.other.call(self.other._deliver, b"".join((head, *parts)))
        await asyncio.sleep(0)

    def close(self) -> None:
        """End both sides."""
        if not self._is_closed:
            self._is_closed = True
            if self.other is not None:
                self.other.call(self.other.end, "the peer ended the connection")
            self._loop.call_soon(self._tell, "closed here")

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function on this side's loop, unless that is gone."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def end(self, why: str) -> None:
        """The other side is gone."""
        if not self._is_closed:
            self._is_closed = True
            self._tell(why)

    def _deliver(self, data: bytes) -> None:
        if self._intake is None:
            self._early.append(data)
        elif not self._is_closed:
            try:
                self._intake.feed(data)
            except FrameError as error:
                self.close()
                self._tell(str(error))

    def _tell(self, why: str) -> None:
        if self._closed is not None:
            self._closed(why)


class LocalTransport:
    """Channels of one network."""

    def __init__(self, network: LocalNetwork, name: str = "tcp") -> None:
        self.name = name
        self._network = network
        self._address = network.address()

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Be found under a new address."""
        self._network.listening[self._address] = (asyncio.get_running_loop(), accept)
        return self._address

    async def dial(self, address: str) -> Channel:
        """Connect. Raises Unreachable."""
        found = self._network.listening.get(address)
        if found is None:
            raise Unreachable(f"nobody listens at {address}")
        loop, accept = found
        mine, theirs = LocalChannel(asyncio.get_running_loop()), LocalChannel(loop)
        mine.other, theirs.other = theirs, mine
        theirs.call(accept, theirs)
        return mine

    async def close(self) -> None:
        """Be found no more."""
        self._network.listening.pop(self._address, None)
