"""One-sided writes by NIXL: the agent of this process, and the writes that are under way.

A write cannot be called back. Whoever began it may stop waiting, its link may have ended: it stays
in the agent's books until the library says that it has ended, and until then a peer is not told
that nothing of it is in flight (see `landing`).
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nixl_cu12._api import nixl_agent, nixl_agent_config

from quire.transfer.frames import HEADER_BYTES, MAX_ENTRIES, FrameError
from quire.transfer.landing import MAX_SLOTS, SLOT_BYTES, Slab
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.proto import transfer_pb2
    from quire.transfer.memory import PoolMemory

logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints to stdout otherwise

MEMORY = "DRAM"
POLL_S = 0.002
"""A write is watched this long before another link's turn."""
_YIELD_S = 20e-6
"""Between two looks at a write: the agent's own thread makes the progress and needs the CPU."""
MAX_WRITES = 1024
"""In flight at once, to all peers: one per link, and those that links left behind."""


@dataclass(eq=False)
class Target:
    """The slots of one peer, prepared for writing."""

    name: str
    base: int
    num_slots: int
    prepared: dict[int, Any] = field(default_factory=dict)
    """Length of a piece -> remote descriptors of that length, then the trailers."""


@dataclass(eq=False)
class Write:
    """A one-sided write that was begun."""

    target: Target
    handle: Any
    head: int
    """Which of the agent's copies of heads it reads."""
    state: str = "PROC"
    """The library's word: DONE, PROC while it is in flight, anything else when it failed."""

    @property
    def is_done(self) -> bool:
        """Everything has landed."""
        return self.state == "DONE"


class Agent:
    """A NIXL agent; every method runs on its thread."""

    def __init__(self, name: str, memory: PoolMemory) -> None:
        self.name = name
        self._memory = memory
        self._agent: Any = nixl_agent(name, nixl_agent_config())
        self._base = address_of(memory.buffer)
        self._heads = (ctypes.c_char * (HEADER_BYTES * MAX_WRITES))()
        self._heads_base = ctypes.addressof(self._heads)
        self._free_heads = deque(range(MAX_WRITES))
        self._prepared: dict[tuple[int, int], Any] = {}
        self._writes: list[Write] = []
        """In flight, whether or not somebody still waits: none can be called back."""
        for view in (memory.buffer, memory.probe):
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
        target = Target(name, landing.base, landing.num_slots)
        return target, self.is_drained(target)

    def is_drained(self, target: Target) -> bool:
        """Whether nothing is in flight to the target's peer but what goes to this target."""
        in_flight = [write.target for write in list(self._writes) if not self._has_ended(write)]
        return not any(t is not target and t.name == target.name for t in in_flight)

    def post(self, target: Target, slot: int, head: bytes, parts: Sequence[memoryview]) -> Write:
        """Start to write a frame's payload and trailer into a slot, and watch it for a moment.

        Raises OSError, and whatever the library does.
        """
        if not self._free_heads:
            raise OSError("too many one-sided writes are in flight")
        # A copy of its own: the write may read it late, after a frame to another peer was begun.
        place = self._free_heads.popleft()
        at = self._heads_base + place * HEADER_BYTES
        ctypes.memmove(at, head[:HEADER_BYTES], HEADER_BYTES)
        try:
            handle = self._make(target, slot, place, parts)
            self._agent.transfer(handle)
        except Exception:
            self._free_heads.append(place)
            raise
        write = Write(target, handle, place)
        self._writes.append(write)
        self.poll(write)
        return write

    def poll(self, write: Write) -> None:
        """Watch a write for a moment. Raises OSError when it failed."""
        end = time.monotonic() + POLL_S
        while not self._has_ended(write) and time.monotonic() < end:
            time.sleep(_YIELD_S)
        if write.state not in ("PROC", "DONE"):
            raise OSError(f"a one-sided write failed: {write.state}")

    def _has_ended(self, write: Write) -> bool:
        """Look at a write; one that has ended reads and writes no memory any more."""
        if write.state != "PROC":
            return True
        try:
            write.state = self._agent.check_xfer_state(write.handle)
        except Exception as error:  # noqa: BLE001 (the library's own; the peer is gone)
            write.state = str(error) or type(error).__name__
        if write.state == "PROC":
            return False
        self._writes.remove(write)
        self._free_heads.append(write.head)
        if write.is_done:
            self._agent.release_xfer_handle(write.handle)
        return True

    def _make(self, target: Target, slot: int, place: int, parts: Sequence[memoryview]) -> Any:
        """The transfer of parts and a head into a slot."""
        places = [divmod(address_of(part) - self._base, self._memory.block_bytes) for part in parts]
        kinds = {(offset, len(part)) for (_, offset), part in zip(places, parts, strict=True)}
        inside = all(0 <= at < self._memory.num_places for at, _ in places)
        if not inside or len(kinds) > 1:
            return self._describe(target, slot, place, parts)
        local, remote = self._prepare(target, kinds.pop())
        each = _per_slot(len(parts[0]))
        return self._agent.make_prepped_xfer(
            "WRITE",
            local,
            [*(at for at, _ in places), self._memory.num_places + place],
            remote,
            [*range(slot * each, slot * each + len(parts)), target.num_slots * each + slot],
        )

    def _prepare(self, target: Target, kind: tuple[int, int]) -> tuple[Any, Any]:
        """Descriptor lists, made once per pair and length: of every block and head here, of every
        place and trailer in the peer's slots."""
        offset, length = kind
        if kind not in self._prepared:
            rows = [
                (self._base + b * self._memory.block_bytes + offset, length, 0)
                for b in range(self._memory.num_places)
            ]
            rows += [
                (self._heads_base + h * HEADER_BYTES, HEADER_BYTES, 0) for h in range(MAX_WRITES)
            ]
            self._prepared[kind] = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, MEMORY)
        if length not in target.prepared:
            rows = [
                (target.base + s * SLOT_BYTES + i * length, length, 0)
                for s in range(target.num_slots)
                for i in range(_per_slot(length))
            ]
            rows += [(*_trailer(target, s), 0) for s in range(target.num_slots)]
            target.prepared[length] = self._agent.prep_xfer_dlist(target.name, rows, MEMORY)
        return self._prepared[kind], target.prepared[length]

    def _describe(self, target: Target, slot: int, place: int, parts: Sequence[memoryview]) -> Any:
        """A transfer described piece by piece: mixed lengths, or not of the pool."""
        local, remote, at = [], [], target.base + slot * SLOT_BYTES
        for part in parts:
            local.append((address_of(part), len(part), 0))
            remote.append((at, len(part), 0))
            at += len(part)
        local.append((self._heads_base + place * HEADER_BYTES, HEADER_BYTES, 0))
        remote.append((*_trailer(target, slot), 0))
        make = self._agent.get_xfer_descs
        return self._agent.initialize_xfer(
            "WRITE", make(local, MEMORY), make(remote, MEMORY), target.name
        )


def _per_slot(length: int) -> int:
    """Pieces of that length in a frame."""
    return min(FRAME_BYTES // length, MAX_ENTRIES)


def _trailer(target: Target, slot: int) -> tuple[int, int]:
    return target.base + (slot + 1) * SLOT_BYTES - HEADER_BYTES, HEADER_BYTES
