"""One connection between two processes: greeting, heartbeats, and the order of writing.

    GREETING   only HELLO, AUTH and REFUSE are understood, for at most the connect timeout
    READY      both proved the token and agree on the layout; frames of transfers flow
    CLOSED     nothing is written or handled any more

Frames go out in turn, those of control before those with data, as many at once as the channel
takes. A link that heard nothing for some heartbeats is closed: a stopped process keeps its sockets
open and no keepalive of a kernel or of gRPC tells it from a healthy one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from quire.proto import transfer_pb2
from quire.transfer.frames import FrameError, Header, Kind, pack
from quire.transfer.intake import Intake
from quire.transfer.layout import Shard
from quire.transfer.negotiate import compatibility
from quire.transfer.state import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.transfer.base import Channel, Node
    from quire.transfer.frames import Entry

logger = logging.getLogger(__name__)

REFUSED_INCOMPATIBLE = 100
REFUSED_UNAUTHENTICATED = 101
_GREETINGS = (Kind.HELLO, Kind.AUTH, Kind.WELCOME, Kind.REFUSE)
FLUSH_S = 0.2
"""Time for a refusal to leave before the connection is closed."""


class LinkState(Enum):
    """See the module."""

    GREETING = "greeting"
    READY = "ready"
    CLOSED = "closed"


class LinkRefused(Exception):
    """The greeting ended without a link."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


@dataclass(frozen=True)
class Outgoing:
    """A frame to write."""

    head: bytes
    parts: tuple[memoryview, ...] = ()
    written: Callable[[], None] | None = None
    """Called when the parts are no longer read, or the link is closed."""


class Link:
    """See the module. A subclass per direction handles the frames of transfers."""

    def __init__(self, channel: Channel, transport: str, node: Node) -> None:
        self.transport = transport
        self.state = LinkState.GREETING
        self.peer = transfer_pb2.Hello()
        self.peer_shard = Shard()
        self.why = ""
        """Why it closed."""
        self.node = node
        self.frame_bytes = channel.frame_bytes
        self._channel = channel
        self._greetings: asyncio.Queue[tuple[Header, bytes]] = asyncio.Queue()
        self._control: deque[Outgoing] = deque()
        self._wake = asyncio.Event()
        self._heard = self._said = node.clock()
        self._patience_s = node.config.kv_heartbeat_s * node.config.kv_heartbeat_misses
        channel.start(_Heard(self), self.close)

    @property
    def is_ready(self) -> bool:
        """Transfers may use it."""
        return self.state is LinkState.READY

    # ---- life

    async def greet(self) -> None:
        """Come to READY. Raises LinkRefused; the link is then closed."""
        try:
            async with asyncio.timeout(self.node.config.kv_connect_timeout_s):
                await self._greet()
        except TimeoutError:
            self.close("no greeting in time")
            raise LinkRefused(Failure.UNREACHABLE, "no greeting in time") from None
        except LinkRefused as refusal:
            self.close(refusal.detail)
            raise

    async def run(self) -> None:
        """Write until closed."""
        try:
            await asyncio.gather(*(self._write() for _ in range(self._channel.frames_at_once)))
        finally:
            self.close("the endpoint stops")

    async def _write(self) -> None:
        while self.state is LinkState.READY:
            if (frame := self._next()) is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._said = self.node.clock()
            try:
                await self._channel.send(frame.head, frame.parts)
            finally:
                if frame.written is not None:
                    frame.written()

    def close(self, why: str) -> None:
        """End the link; every transfer on it is told, once."""
        if self.state is LinkState.CLOSED:
            return
        was_ready = self.state is LinkState.READY
        self.state = LinkState.CLOSED
        self.why = why
        self._control.clear()
        self._channel.close()
        self._greetings.put_nowait((Header(0), b""))
        self._wake.set()
        if was_ready:
            logger.info("KV link over %s with %s ended: %s", self.transport, self.peer.worker, why)
            self.on_lost()

    def tick(self, now: float) -> None:
        """Say that this side lives; close when the other did not for too long."""
        if self.state is not LinkState.READY:
            return
        if now - self._heard > self._patience_s:
            self.close(f"silent for {now - self._heard:.1f} s")
        elif now - self._said >= self.node.config.kv_heartbeat_s / 2:
            self.post(Header(Kind.PING))

    def heard(self) -> None:
        """Something arrived, or this process itself was stopped for a while."""
        self._heard = self.node.clock()

    # ---- writing

    def post(self, header: Header, body: bytes = b"") -> None:
        """Queue a frame of control."""
        self.put(Outgoing(pack(header, body)))

    def put(self, frame: Outgoing) -> None:
        """Queue a packed frame before the data."""
        if self.state is not LinkState.CLOSED:
            self._control.append(frame)
            self._wake.set()

    def wake(self) -> None:
        """There may be data to write."""
        self._wake.set()

    def _next(self) -> Outgoing | None:
        return self._control.popleft() if self._control else self.next_data()

    # ---- what a direction adds

    async def _greet(self) -> None:
        raise NotImplementedError

    def next_data(self) -> Outgoing | None:
        """A frame of data that may be written now."""
        return None

    def on_lost(self) -> None:
        """The link ended after it was READY."""

    def on_transfer_frame(self, header: Header, body: bytes) -> None:
        """A frame of a transfer, other than DATA."""
        raise FrameError(f"frame kind {header.kind} does not come this way")

    # ---- FrameHandler

    def on_frame(self, header: Header, body: bytes) -> None:
        """A frame other than DATA."""
        if self.state is LinkState.GREETING:
            if header.kind == Kind.PING:
                return  # right behind the welcome, which the task that greets has yet to see
            if header.kind not in _GREETINGS:
                raise FrameError("frames before the greeting")
            self._greetings.put_nowait((header, body))
        elif header.kind == Kind.REFUSE:
            raise FrameError(f"refused: {transfer_pb2.KvRefusal.FromString(body).detail}")
        elif header.kind != Kind.PING and self.state is LinkState.READY:
            try:
                self.on_transfer_frame(header, body)
            except DecodeError as error:
                raise FrameError("a message that cannot be read") from error

    def places(self, header: Header, entries: Sequence[Entry]) -> list[memoryview] | None:
        """DATA where none is expected."""
        raise FrameError("data from the wrong side, or before the greeting")

    def holds(self) -> bool:
        """No data, no places."""
        return False

    def landed(self, number: int) -> None:
        """No data."""

    def finished(self, header: Header) -> None:
        """A probe was read."""
        if self.state is not LinkState.READY:
            raise FrameError("a probe before the greeting")
        self.post(Header(Kind.PROBED, sequence=header.sequence))

    # ---- greeting

    def _ready(self) -> None:
        if self.state is not LinkState.GREETING:
            raise LinkRefused(Failure.UNREACHABLE, self.why)
        self.state = LinkState.READY
        self.node.counters.links[self.transport] += 1
        slower_s = max(self.peer.heartbeat_ms / 1000, self.node.config.kv_heartbeat_s)
        self._patience_s = slower_s * self.node.config.kv_heartbeat_misses

    def _hello(self) -> transfer_pb2.Hello:
        node = self.node
        return node.identity.hello(node.listeners, node.config.kv_transports)

    async def _send_greeting(self, kind: Kind, body: bytes) -> None:
        await self._channel.send(pack(Header(kind), body))

    async def _refuse(self, code: int, detail: str) -> None:
        self.node.counters.refused_links += 1
        refusal = transfer_pb2.KvRefusal(code=code, detail=detail)
        await self._send_greeting(Kind.REFUSE, refusal.SerializeToString())
        await asyncio.sleep(FLUSH_S)
        raise LinkRefused(Failure.INCOMPATIBLE, detail)

    async def _expect(self, kind: Kind) -> bytes:
        header, body = await self._greetings.get()
        if header.kind == Kind.REFUSE:
            refusal = transfer_pb2.KvRefusal.FromString(body)
            raise LinkRefused(Failure.INCOMPATIBLE, refusal.detail)
        if header.kind != kind:
            raise LinkRefused(Failure.UNREACHABLE, self.why or "not a KV endpoint")
        return body

    def _learn(self, body: bytes) -> None:
        try:
            self.peer = transfer_pb2.Hello.FromString(body)
            self.peer_shard = Shard(self.peer.rank, max(self.peer.degree, 1))
        except (DecodeError, ValueError) as error:
            raise LinkRefused(Failure.UNREACHABLE, "a greeting that cannot be read") from error


class DialledLink(Link):
    """The side that connected: the sender of blocks."""

    expected_incarnation = 0
    """Of the process that shall answer; 0 for whoever is there."""

    async def _greet(self) -> None:
        identity, hello = self.node.identity, self._hello()
        await self._send_greeting(Kind.HELLO, hello.SerializeToString())
        self._learn(await self._expect(Kind.HELLO))
        peer = self.peer
        if not identity.accepts(peer.proof, "acceptor", hello.nonce, peer.nonce):
            raise LinkRefused(Failure.INCOMPATIBLE, "the peer does not know the cluster's token")
        if self.expected_incarnation not in (0, peer.incarnation):
            raise LinkRefused(Failure.UNREACHABLE, "another process answers at this address")
        proof = identity.prove("dialler", hello.nonce, peer.nonce)
        await self._send_greeting(Kind.AUTH, proof)
        if (problem := compatibility(identity, peer)) is not None:
            raise LinkRefused(Failure.INCOMPATIBLE, problem.reason)
        await self._expect(Kind.WELCOME)
        self._ready()


class AcceptedLink(Link):
    """The side that was connected to: the receiver of blocks."""

    async def _greet(self) -> None:
        identity, hello = self.node.identity, self._hello()
        self._learn(await self._expect(Kind.HELLO))
        theirs = self.peer.nonce
        hello.proof = identity.prove("acceptor", theirs, hello.nonce)
        await self._send_greeting(Kind.HELLO, hello.SerializeToString())
        proof = await self._expect(Kind.AUTH)
        if not identity.accepts(proof, "dialler", theirs, hello.nonce):
            await self._refuse(REFUSED_UNAUTHENTICATED, "the cluster's token was not proved")
        if (problem := compatibility(identity, self.peer)) is not None:
            await self._refuse(REFUSED_INCOMPATIBLE, problem.reason)
        self._ready()  # before the welcome: the answer to it may overtake this task
        await self._send_greeting(Kind.WELCOME, b"")


class _Heard(Intake):
    """Notes when something arrived."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._link = link

    def advance(self, count: int) -> None:
        """`count` bytes were written into the last buffers."""
        self._link.heard()
        super().advance(count)

    def feed(self, data: bytes | memoryview) -> None:
        """These bytes arrived."""
        self._link.heard()
        super().feed(data)
