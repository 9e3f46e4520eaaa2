"""A rank's KV pool, as transfers read and write it.

Transports work on *places*: rooms of one block each in host memory.

    sending      claim a place -> load  -> pieces are read there                       -> vacate
    receiving    claim a place -> pieces land there, are verified there -> store, which vacates it

    HostMemory     the pool is host memory: a block is its own place, load and store are nothing
    StagedMemory   the pool is a device's: some places in pinned memory, copies in between
                   (`staging`)

A block without a place waits in its transfer: a receiver grants only what has one, so nothing ever
arrives that has nowhere to go. All of it is called on the endpoint's thread.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quire.transfer.layout import FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

Done = Callable[[Exception | None], None]
"""Called once, when a copy is complete or why it failed."""


class PoolMemory(ABC):
    """See the module. `buffer` is any writable, contiguous buffer of whole blocks: all places."""

    def __init__(self, buffer: Any, block_bytes: int) -> None:
        view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        if view.readonly or not view.nbytes or view.nbytes % block_bytes:
            raise ValueError(f"{view.nbytes} bytes are no writable pool of {block_bytes} a block")
        self.buffer = view
        self.block_bytes = block_bytes
        self.num_places = view.nbytes // block_bytes
        self.num_blocks = self.num_places
        """Of the pool."""
        self.probe = memoryview(bytearray(FRAME_BYTES))

    def view(self, place: int, offset: int, length: int) -> memoryview:
        """Bytes [offset, offset + length) at a place. Raises IndexError outside."""
        if not (0 <= place < self.num_places and 0 <= offset <= self.block_bytes - length):
            raise IndexError(f"bytes {offset}+{length} of place {place} are outside the memory")
        start = place * self.block_bytes + offset
        return self.buffer[start : start + length]

    def probe_bytes(self, length: int) -> memoryview:
        """Up to 1 MiB to measure a link with: not the pool's, which may hold someone's text."""
        return self.probe[:length]

    # ---- sending

    @abstractmethod
    def claim_to_send(self, slots: Collection[int]) -> Sequence[int]:
        """Places for the first of these blocks of the pool; fewer than blocks when there is no
        room, to be asked again when some of the sender's were vacated."""

    @abstractmethod
    def load(self, slots: Sequence[int], places: Sequence[int], done: Done) -> None:
        """Have blocks of the pool at the places that were claimed for them. They must have been
        written by a step that is complete, and stay as they are until `done`."""

    # ---- receiving

    @abstractmethod
    def claim_to_land(self, slots: Collection[int], num_ready: int) -> Sequence[int]:
        """Places for the first of these blocks of the pool, of which senders have the first
        `num_ready` ready; fewer when there is no room, to be asked again when some of the
        receiver's were vacated or more are ready."""

    @abstractmethod
    def store(self, slot: int, place: int, done: Done) -> None:
        """Have the block of the pool as it is at its place, which is vacated then. Nobody else
        reads or writes it, in a step or otherwise, until `done`."""

    # ----

    @abstractmethod
    def vacate(self, places: Iterable[int]) -> None:
        """These places may be claimed again; not while they are loaded or stored."""

    @abstractmethod
    async def close(self) -> None:
        """Return when every copy is done, and has been told so."""


class HostMemory(PoolMemory):
    """A pool in host memory, like the CPU pool's uint8 array [num_blocks, block_bytes]: transports
    read and write the blocks themselves."""

    def claim_to_send(self, slots: Collection[int]) -> Sequence[int]:
        """The blocks."""
        return tuple(slots)

    def load(self, slots: Sequence[int], places: Sequence[int], done: Done) -> None:
        """They are there."""
        done(None)

    def claim_to_land(self, slots: Collection[int], num_ready: int) -> Sequence[int]:
        """The blocks, ready or not: granted early, they come as soon as they are computed."""
        return tuple(slots)

    def store(self, slot: int, place: int, done: Done) -> None:
        """It is there."""
        done(None)

    def vacate(self, places: Iterable[int]) -> None:
        """Nothing was taken."""

    async def close(self) -> None:
        """Nothing is copied."""


def address_of(view: Any) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
