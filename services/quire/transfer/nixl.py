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
import ctypes
import logging
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nixl_cu12._api import nixl_agent, nixl_agent_config

from quire.proto import transfer_pb2
from quire.transfer.base import Unreachable
from quire.transfer.frames import (
    HEADER_BYTES,
    MAX_ENTRIES,
    Entry,
    FrameError,
    Header,
    Kind,
    pack,
    unpack,
)
from quire.transfer.intake import Intake
from quire.transfer.landing import MAX_SLOTS, SLOT_BYTES, Quarantine, Slab
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.memory import address_of
from quire.transfer.tcp import TcpChannel, TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Channel, Node
    from quire.transfer.memory import PoolMemory

logger = logging.getLogger(__name__)

logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints to stdout otherwise

MEMORY = "DRAM"
POLL_S = 0.002
"""A write is watched this long before another link's turn."""
_YIELD_S = 20e-6
"""Between two looks at a write: the agent's own thread makes the progress and needs the CPU."""


@dataclass
class Target:
    """The slots of one peer, prepared for writing."""

    name: str
    base: int
    num_slots: int
    prepared: dict[int, Any] = field(default_factory=dict)
    """Length of a piece -> remote descriptors of that length, then the trailers."""


class Agent:
    """A NIXL agent; every method runs on its thread."""

    def __init__(self, name: str, memory: PoolMemory) -> None:
        self.name = name
        self._memory = memory
        self._agent: Any = nixl_agent(name, nixl_agent_config())
        self._base = address_of(memory.pool)
        self._heads = (ctypes.c_char * (HEADER_BYTES * 256))()
        self._heads_base = ctypes.addressof(self._heads)
        self._prepared: dict[tuple[int, int], Any] = {}
        self._limbo: list[tuple[str, Any]] = []
        self._in_flight: Counter[str] = Counter()
        for view in (memory.pool, memory.probe):
            self._register(address_of(view), view.nbytes)
        self._register(self._heads_base, len(self._heads))

    def _register(self, base: int, length: int) -> Any:
        return self._agent.register_memory([(base, length, 0, "")], MEMORY)

    def offer(self, slab: Slab) -> bytes:
        """Let others write into a slab; the metadata that they need for it."""
        slab.registration = self._register(slab.base, slab.num_bytes)
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def retire(self, slabs: list[Slab]) -> None:
        """Nobody writes into these any more: their memory may be used for anything."""
        for slab in slabs:
            self._agent.deregister_memory(slab.registration)

    def attach(self, landing: transfer_pb2.KvLanding) -> tuple[Target, bool]:
        """Get ready to write into a peer's slots; whether nothing older is in flight to it."""
        if landing.slot_bytes != SLOT_BYTES or not 1 <= landing.num_slots <= MAX_SLOTS:
            raise FrameError("landing slots of another size")
        name = self._agent.add_remote_agent(landing.agent)
        name = name.decode() if isinstance(name, bytes) else str(name)
        self._limbo = [item for item in self._limbo if not self._is_done(item[1])]
        drained = not self._in_flight[name] and all(peer != name for peer, _ in self._limbo)
        return Target(name, landing.base, landing.num_slots), drained

    def post(
        self, target: Target, slot: int, head: bytes, parts: Sequence[memoryview]
    ) -> tuple[Any, bool]:
        """Start to write a frame's payload and trailer into a slot: the handle to poll, and
        whether the write is complete already."""
        at = slot * HEADER_BYTES
        ctypes.memmove(self._heads_base + at, head[:HEADER_BYTES], HEADER_BYTES)
        places = [divmod(address_of(part) - self._base, self._memory.block_bytes) for part in parts]
        kinds = {(offset, len(part)) for (_, offset), part in zip(places, parts, strict=True)}
        inside = all(0 <= block < self._memory.num_blocks for block, _ in places)
        if inside and len(kinds) == 1:
            handle = self._prepare(target, slot, [block for block, _ in places], kinds.pop())
        else:
            handle = self._describe(target, slot, parts)
        self._agent.transfer(handle)
        self._in_flight[target.name] += 1
        return handle, self.poll(handle)

    def poll(self, handle: Any) -> bool:
        """Watch a write for a moment; True when it is complete. Raises when it failed."""
        end = time.monotonic() + POLL_S
        while (state := self._agent.check_xfer_state(handle)) == "PROC":
            if time.monotonic() > end:
                return False
            time.sleep(_YIELD_S)
        if state != "DONE":
            raise OSError(f"a one-sided write failed: {state}")
        self._agent.release_xfer_handle(handle)
        return True

    def finish(self, target: Target, handle: Any, *, is_done: bool) -> None:
        """Nobody waits for the write any more. One that is not done cannot be called back."""
        self._in_flight[target.name] -= 1
        if not is_done:
            self._limbo.append((target.name, handle))

    def _is_done(self, handle: Any) -> bool:
        try:
            return self.poll(handle)
        except Exception as error:  # noqa: BLE001 (the library's own; the peer is gone)
            logger.info("an abandoned write ended: %s", error)
            return True

    def _prepare(self, target: Target, slot: int, blocks: list[int], kind: tuple[int, int]) -> Any:
        """A transfer out of descriptor lists that are made once per pair and length."""
        offset, length = kind
        if kind not in self._prepared:
            step = self._memory.block_bytes
            rows = [
                (self._base + b * step + offset, length, 0) for b in range(self._memory.num_blocks)
            ]
            heads = [
                (self._heads_base + s * HEADER_BYTES, HEADER_BYTES, 0)
                for s in range(len(self._heads) // HEADER_BYTES)
            ]
            self._prepared[kind] = self._agent.prep_xfer_dlist(
                "NIXL_INIT_AGENT", rows + heads, MEMORY
            )
        each = min(FRAME_BYTES // length, MAX_ENTRIES)
        if length not in target.prepared:
            rows = [
                (target.base + s * SLOT_BYTES + i * length, length, 0)
                for s in range(target.num_slots)
                for i in range(each)
            ]
            rows += [(*_trailer(target, s), 0) for s in range(target.num_slots)]
            target.prepared[length] = self._agent.prep_xfer_dlist(target.name, rows, MEMORY)
        remote = [slot * each + i for i in range(len(blocks))]
        return self._agent.make_prepped_xfer(
            "WRITE",
            self._prepared[kind],
            [*blocks, self._memory.num_blocks + slot],
            target.prepared[length],
            [*remote, target.num_slots * each + slot],
        )

    def _describe(self, target: Target, slot: int, parts: Sequence[memoryview]) -> Any:
        """A transfer described piece by piece: mixed lengths, or not of the pool."""
        local, remote, at = [], [], target.base + slot * SLOT_BYTES
        for part in parts:
            local.append((address_of(part), len(part), 0))
            remote.append((at, len(part), 0))
            at += len(part)
        local.append((self._heads_base + slot * HEADER_BYTES, HEADER_BYTES, 0))
        remote.append((*_trailer(target, slot), 0))
        make = self._agent.get_xfer_descs
        return self._agent.initialize_xfer(
            "WRITE", make(local, MEMORY), make(remote, MEMORY), target.name
        )


def _trailer(target: Target, slot: int) -> tuple[int, int]:
    return target.base + (slot + 1) * SLOT_BYTES - HEADER_BYTES, HEADER_BYTES


class NixlChannel:
    """A tcp channel whose payloads take the other way."""

    frame_bytes = FRAME_BYTES

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
        handle, is_done = await run(agent.post, target, slot, head, parts)
        try:
            while not is_done and not self._is_closed:
                is_done = await run(agent.poll, handle)
        finally:
            agent.finish(target, handle, is_done=is_done)

    async def _attach(self, landing: transfer_pb2.KvLanding) -> None:
        agent = self._transport.agent
        try:
            self._target, drained = await self._transport.run(agent.attach, landing)
        except Exception as error:  # noqa: BLE001 (the library raises its own kinds)
            self._end(f"cannot write to the peer: {error}")
            return
        writer = transfer_pb2.KvWriter(agent=agent.name, drained=drained)
        self._inner.post(pack(Header(Kind.WRITER), writer.SerializeToString()))
        self._credits.extend(range(self._target.num_slots))
        self._changed.set()

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
        self._agent = await self.run(Agent, name, self._node.memory)

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
