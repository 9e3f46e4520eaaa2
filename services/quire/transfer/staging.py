"""A pool in a device's memory, exchanged through a bounded number of places in pinned host memory.

    pool on the device                    places                         transports
    written by completed steps -- load --> outbound half -- sums, reads -->
    nobody's step           <-- store --  inbound half  <-- lands, is verified --

Why two halves: what is sent leaves whenever the peer has room, so outbound places always come free;
what arrives is stored whenever the device copies, so inbound ones do. With places shared, two pods
could each wait for the other to send with all of their places taken up by what they receive.

Why only what is ready lands: a place is claimed for a block when its senders have said that they
have it. Claimed any earlier, the places could be taken up by prompts that queue at a prefill pod
behind the very prompt whose blocks find no place.

Copies are made in batches, one at a time in each direction: whatever is asked for while one runs
goes into the next.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quire.transfer.memory import PoolMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from quire.transfer.memory import Done

logger = logging.getLogger(__name__)


class BlockCopies(Protocol):
    """Whole blocks between a device's pool and places in host memory: all that differs by device.

    Each call returns when its copies are complete; both may run at the same time, on two threads.
    """

    places: Any
    """Writable buffer of whole blocks in host memory."""
    num_blocks: int
    """Of the pool."""
    block_bytes: int

    def copy_out(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """From these blocks of the pool to these places."""

    def copy_in(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """From these places to these blocks of the pool."""


class StagedMemory(PoolMemory):
    """See the module. Raises ValueError when there is not a place for each direction."""

    def __init__(self, copies: BlockCopies) -> None:
        super().__init__(copies.places, copies.block_bytes)
        if self.num_places < 2:
            raise ValueError("a staged pool needs at least two places, one for each direction")
        self.num_blocks = copies.num_blocks
        half = self.num_places // 2
        self.outbound = Lane("out", range(half), copies.copy_out)
        self.inbound = Lane("in", range(half, self.num_places), copies.copy_in)

    def claim_to_send(self, slots: Collection[int]) -> Sequence[int]:
        """As many as there is room for."""
        return self.outbound.claim(len(slots))

    def load(self, slots: Sequence[int], places: Sequence[int], done: Done) -> None:
        """With the next batch."""
        self.outbound.copy(Request(slots, places, done))

    def claim_to_land(self, slots: Collection[int], num_ready: int) -> Sequence[int]:
        """As many of those that are ready as there is room for."""
        return self.inbound.claim(num_ready)

    def store(self, slot: int, place: int, done: Done) -> None:
        """With the next batch."""

        def stored(error: Exception | None) -> None:
            self.inbound.vacate(place)
            done(error)

        self.inbound.copy(Request((slot,), (place,), stored))

    def vacate(self, places: Iterable[int]) -> None:
        """Back to the half that they are of."""
        for place in places:
            lane = self.outbound if place < self.inbound.first else self.inbound
            lane.vacate(place)

    async def close(self) -> None:
        """Finish both directions."""
        await self.outbound.close()
        await self.inbound.close()


@dataclass(frozen=True)
class Request:
    """Blocks to copy."""

    slots: Sequence[int]
    places: Sequence[int]
    done: Done


class Lane:
    """One direction: its places, and the copies that wait while another is made."""

    def __init__(
        self, name: str, places: range, copy: Callable[[Sequence[int], Sequence[int]], None]
    ) -> None:
        self.first = places.start
        self._free = list(places)  # a heap: low numbers first, so that a batch lies side by side
        self._taken: set[int] = set()
        self._copy = copy
        self._waiting: list[Request] = []
        self._running: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kv-copy-{name}")

    @property
    def num_taken(self) -> int:
        """Places that are claimed."""
        return len(self._taken)

    def claim(self, count: int) -> list[int]:
        """Up to `count` places."""
        claimed = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        self._taken.update(claimed)
        return claimed

    def vacate(self, place: int) -> None:
        """Raises KeyError for a place that is not claimed."""
        self._taken.remove(place)
        heapq.heappush(self._free, place)

    def copy(self, request: Request) -> None:
        """With the next batch. On an event loop."""
        self._waiting.append(request)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Return when nothing is copied any more and the last request has been told."""
        if self._running is not None:
            await self._running
        self._thread.shutdown()

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            error = await self._copied(batch)
            for request in batch:
                request.done(error)
        self._running = None

    async def _copied(self, batch: list[Request]) -> Exception | None:
        slots = [slot for request in batch for slot in request.slots]
        places = [place for request in batch for place in request.places]
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._copy, slots, places)
        except Exception as error:  # the device's own; the engine finds out at its next step
            logger.exception("KV blocks could not be copied")
            return error
        return None
