"""Landing slabs: memory that a peer writes into by itself, and what becomes of it.

A one-sided write cannot be called back: a released one still lands, seconds later, when its process
was stopped in between. So it never goes into the pool. Each link that receives has a slab of slots:

    lent          the sender may write into the slot, whenever it wants
    landed        the sender said that its write is complete: the slot is read, then lent again
    quarantined   the link ended: the sender may still write. The memory is given back to the
                  system but the addresses stay taken, until the same process says on a new link
                  that nothing of it is in flight
"""

from __future__ import annotations

import mmap
from collections import defaultdict

from quire.transfer.frames import HEADER_BYTES, FrameError
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.memory import address_of

SLOT_BYTES = FRAME_BYTES + 4096
"""Payload of a frame, and at the very end the trailer: the frame's header."""
MAX_SLOTS = 256
MAX_QUARANTINED = 64
"""Slabs. With more, new links are refused: they take another transport."""


class Slab:
    """Slots of one receiving link."""

    def __init__(self, num_bytes: int) -> None:
        self.num_slots = min(max(num_bytes // SLOT_BYTES, 1), MAX_SLOTS)
        self.num_bytes = self.num_slots * SLOT_BYTES
        self.memory = mmap.mmap(-1, self.num_bytes)
        self.base = address_of(self.memory)
        self.registration: object = None
        """The agent's."""
        self._view = memoryview(self.memory)

    def read(self, slot: int, head: bytes, length: int) -> memoryview:
        """The payload that landed in a slot. Raises FrameError unless its trailer is `head`'s."""
        if not 0 <= slot < self.num_slots or not 0 <= length <= FRAME_BYTES:
            raise FrameError("a landing slot that does not exist")
        start, end = slot * SLOT_BYTES, (slot + 1) * SLOT_BYTES
        if self._view[end - HEADER_BYTES : end] != head[:HEADER_BYTES]:
            raise FrameError("a landing slot holds another frame")
        return self._view[start : start + length]

    def forget(self) -> None:
        """Give the memory back, keep the addresses: a late write finds an empty page."""
        self.memory.madvise(mmap.MADV_DONTNEED)


class Quarantine:
    """Slabs of links that ended, by the process that may still write into them."""

    def __init__(self) -> None:
        self._slabs: defaultdict[str, list[Slab]] = defaultdict(list)

    @property
    def num_bytes(self) -> int:
        """Addresses that are taken."""
        return sum(slab.num_bytes for slabs in self._slabs.values() for slab in slabs)

    @property
    def is_full(self) -> bool:
        """No more may be added by new links."""
        return sum(map(len, self._slabs.values())) >= MAX_QUARANTINED

    def add(self, writer: str, slab: Slab) -> None:
        """The link ended."""
        slab.forget()
        self._slabs[writer].append(slab)

    def release(self, writer: str) -> list[Slab]:
        """The process says that nothing is in flight: its slabs may be used again."""
        return self._slabs.pop(writer, [])
