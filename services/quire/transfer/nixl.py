"""Payloads by one-sided NIXL writes (UCX: RDMA, shared memory, TCP), everything else over tcp.

    receiver                                    sender
    WELCOME, LANDING{agent, slots}  -- tcp -->  WRITER{agent}
                                    <- write -- payload and trailer into a lent slot, wait for it
                                    <- tcp ---  LANDED{slot, head of the frame}
    trailer fits: head and payload go through
    the intake like a frame off a socket, so
    fences and checksums are the same
    CREDIT{slot}                    -- tcp -->

The write goes into a landing slab and not into the pool, for the reasons in `landing`. Everything
that touches the agent runs on one thread of its own: over shared memory a write blocks its caller
for the whole copy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from quire.proto import transfer_pb2
from quire.transfer.base import Unreachable
from quire.transfer.frames import HEADER_BYTES, Entry, FrameError, Header, Kind, pack, unpack
from quire.transfer.intake import Intake
from quire.transfer.landing import SLOT_BYTES, Quarantine, Slab
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.nixl_agent import Agent, Target
from quire.transfer.tcp import TcpChannel, TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Channel, Node

DRAIN_POLL_S = 0.05
"""Between two looks at writes that an earlier link left behind."""


class NixlChannel:
    """A tcp channel whose payloads take the other way."""

    frame_bytes = FRAME_BYTES
    frames_at_once = 4

    def __init__(self, inner: TcpChannel, transport: NixlTransport) -> None:
        self._inner = inner
        self._transport = transport
        self._outer: Intake | None = None
        self._closed: Callable[[str], None] | None = None
        self._is_closed = False
        self._slab: Slab | None = None
        self._writer = ""
        self._target: Target | None = None
        self._credits: deque[int] = deque()
        self._changed = asyncio.Event()
        self._breathing: asyncio.Task[None] | None = None
        self._attaching: asyncio.Task[None] | None = None
        self._releasing: asyncio.Task[None] | None = None

    # ---- Channel

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake from now on."""
        self._outer, self._closed = intake, closed
        self._inner.start(Intake(_Control(self)), self._end)
        self._breathing = asyncio.get_running_loop().create_task(self._breathe())

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame; its parts as a one-sided write."""
        if not parts:
            await self._inner.send(head)
            if head[4] == Kind.WELCOME:  # the peer is authenticated: it may write
                await self._offer_slab()
            return
        while not self._credits and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        if self._is_closed or self._target is None:
            return
        slot = self._credits.popleft()
        try:
            await self._write(self._target, slot, head, parts)
        except Exception as error:  # noqa: BLE001 (the library raises its own kinds)
            self._end(f"one-sided write: {error or type(error).__name__}")
            return
        if not self._is_closed:
            await self._inner.send(pack(Header(Kind.LANDED, first=slot), head))

    def close(self) -> None:
        """End the connection at once. What is being written cannot be called back."""
        self._is_closed = True
        self._changed.set()
        self._inner.close()

    async def _breathe(self) -> None:
        """Signs of life while the link's writer waits for a write or a slot: unlike a payload on
        the socket, neither shows the peer that this process lives."""
        while not self._is_closed:
            await asyncio.sleep(self._transport.heartbeat_s / 2)
            if self._target is not None:
                self._inner.post(pack(Header(Kind.PING)))

    # ---- sending

    async def _write(
        self, target: Target, slot: int, head: bytes, parts: Sequence[memoryview]
    ) -> None:
        agent, run = self._transport.agent, self._transport.run
        write = await run(agent.post, target, slot, head, parts)
        while not write.is_done and not self._is_closed:
            await run(agent.poll, write)

    async def _attach(self, landing: transfer_pb2.KvLanding) -> None:
        agent = self._transport.agent
        try:
            self._target, drained = await self._transport.run(agent.attach, landing)
            self._introduce(drained=drained)
            self._credits.extend(range(self._target.num_slots))
            self._changed.set()
            if not drained:
                await self._wait_drained(self._target)
        except Exception as error:  # noqa: BLE001 (the library raises its own kinds)
            self._end(f"cannot write to the peer: {error}")

    async def _wait_drained(self, target: Target) -> None:
        """Say so once it is: what the peer holds in quarantine waits for this word."""
        while not self._is_closed:
            if await self._transport.run(self._transport.agent.is_drained, target):
                self._introduce(drained=True)
                return
            await asyncio.sleep(DRAIN_POLL_S)

    def _introduce(self, *, drained: bool) -> None:
        """Say who writes, and whether no write to an earlier link's slots is in flight."""
        writer = transfer_pb2.KvWriter(agent=self._transport.agent.name, drained=drained)
        self._inner.post(pack(Header(Kind.WRITER), writer.SerializeToString()))

    # ---- receiving

    async def _offer_slab(self) -> None:
        self._slab = slab = Slab(self._transport.landing_bytes)
        metadata = await self._transport.run(self._transport.agent.offer, slab)
        landing = transfer_pb2.KvLanding(
            agent=metadata, base=slab.base, slot_bytes=SLOT_BYTES, num_slots=slab.num_slots
        )
        self._inner.post(pack(Header(Kind.LANDING), landing.SerializeToString()))

    def on_control(self, header: Header, body: bytes) -> None:
        """A frame that came over tcp."""
        if header.kind == Kind.LANDED:
            self._on_landed(header.first, body)
        elif header.kind == Kind.CREDIT:
            self._credits.append(header.first)
            self._changed.set()
        elif header.kind == Kind.LANDING:
            landing = transfer_pb2.KvLanding.FromString(body)
            self._attaching = asyncio.get_running_loop().create_task(self._attach(landing))
        elif header.kind == Kind.WRITER:
            writer = transfer_pb2.KvWriter.FromString(body)
            self._writer = writer.agent
            if writer.drained:
                self._releasing = asyncio.get_running_loop().create_task(
                    self._transport.release(writer.agent)
                )
        elif self._outer is not None:
            self._outer.feed(pack(header, body))

    def _on_landed(self, slot: int, head: bytes) -> None:
        if self._slab is None or self._outer is None or len(head) < HEADER_BYTES:
            raise FrameError("a landing before the greeting")
        length = unpack(head[:HEADER_BYTES]).length - (len(head) - HEADER_BYTES)
        payload = self._slab.read(slot, head, length)
        # Copied first, checked after: what a late write does to the slot meanwhile is found.
        self._outer.feed(head)
        self._outer.feed(payload)
        self._inner.post(pack(Header(Kind.CREDIT, first=slot)))

    def _end(self, why: str) -> None:
        if self._slab is not None:
            self._transport.quarantine(self._writer or f"unknown {id(self)}", self._slab)
            self._slab = None
        self.close()
        for task in (self._breathing, self._attaching):
            if task is not None:
                task.cancel()
        if self._closed is not None:
            closed, self._closed = self._closed, None
            closed(why)


class _Control:
    """Hands whole frames of control to the channel; nothing else may come over tcp."""

    def __init__(self, channel: NixlChannel) -> None:
        self._channel = channel

    def on_frame(self, header: Header, body: bytes) -> None:
        """A frame of control."""
        self._channel.on_control(header, body)

    def places(self, header: Header, entries: Sequence[Entry]) -> list[memoryview] | None:
        """DATA belongs into a landing slot."""
        raise FrameError("data outside the landing slots")

    def holds(self) -> bool:
        """No data, no places."""
        return False

    def landed(self, number: int) -> None:
        """Never."""

    def finished(self, header: Header) -> None:
        """A PROBE with a body."""
        raise FrameError("a probe outside the landing slots")


class NixlTransport:
    """Channels with one-sided payloads. The agent is made when it starts to listen."""

    name = "nixl"

    def __init__(self, config: TransferConfig, node: Node) -> None:
        self.landing_bytes = config.kv_landing_bytes
        self.heartbeat_s = config.kv_heartbeat_s
        self._node = node
        self._tcp = TcpTransport(config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-nixl")
        self._agent: Agent | None = None
        self._quarantine = Quarantine()

    @property
    def agent(self) -> Agent:
        """The process's agent."""
        assert self._agent is not None
        return self._agent

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something of the agent on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Start the agent and listen for control. Raises OSError."""
        identity = self._node.identity
        name = f"{identity.worker}-{identity.shard.rank}-{identity.incarnation:016x}"
        try:
            self._agent = await self.run(Agent, name, self._node.memory)
        except Exception as error:  # the library raises its own kinds
            raise OSError(f"nixl cannot start: {error or type(error).__name__}") from error

        def take(channel: Channel) -> None:
            assert isinstance(channel, TcpChannel)
            if self._quarantine.is_full:
                channel.close()
            else:
                accept(NixlChannel(channel, self))

        return await self._tcp.listen(take)

    async def dial(self, address: str) -> Channel:
        """Connect. Raises OSError."""
        channel = await self._tcp.dial(address)
        if not isinstance(channel, TcpChannel):
            raise Unreachable("not a socket")
        return NixlChannel(channel, self)

    async def close(self) -> None:
        """Stop listening and end the agent."""
        await self._tcp.close()
        await asyncio.to_thread(self._thread.shutdown, wait=True)
        self._agent = None

    def quarantine(self, writer: str, slab: Slab) -> None:
        """A link ended; its sender may still write."""
        self._quarantine.add(writer, slab)
        self._node.counters.quarantined_bytes = self._quarantine.num_bytes

    async def release(self, writer: str) -> None:
        """A process says that none of its writes is in flight."""
        await self.run(self.agent.retire, self._quarantine.release(writer))
        self._node.counters.quarantined_bytes = self._quarantine.num_bytes
