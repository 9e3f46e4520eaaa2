"""A transport that misbehaves on purpose, to see that nothing is lost, leaked or changed by it.

    plan = FaultPlan(seed=1, drop=0.01, corrupt=0.01, kinds=(Kind.DATA,))
    Endpoint(..., transports=[FaultyTransport(TcpTransport(config), plan)])

It acts on whole frames that this side sends, on links that are past their greeting.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.transfer.frames import HEADER_BYTES, Kind, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.transfer.base import Channel, Transport
    from quire.transfer.intake import Intake

_NEVER = (Kind.HELLO, Kind.AUTH, Kind.WELCOME, Kind.REFUSE)
TRANSFER_KINDS = tuple(
    kind for kind in Kind if kind not in (*_NEVER, Kind.PING, Kind.PROBE, Kind.PROBED)
)


@dataclass
class FaultPlan:
    """How often what happens to a frame: probabilities, tried in this order; at most one each."""

    seed: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Sent after the frame that follows it."""
    corrupt: float = 0.0
    """One bit of the body is flipped; a frame without a body is dropped."""
    delay: float = 0.0
    delay_s: float = 0.05
    """Everything behind the frame waits too."""
    half_close_after: int | None = None
    """After this many frames nothing is sent any more; what comes is still read."""
    kinds: tuple[int, ...] = TRANSFER_KINDS
    """Which frames are in danger."""
    done: Counter[str] = field(default_factory=Counter)
    """What was done how often."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def pick(self, kind: int) -> str | None:
        """What to do to a frame."""
        if kind not in self.kinds:
            return None
        for fault in ("drop", "duplicate", "reorder", "corrupt", "delay"):
            if self.random.random() < getattr(self, fault):
                self.done[fault] += 1
                return fault
        return None


class FaultyChannel:
    """A channel whose frames a plan decides about."""

    def __init__(self, inner: Channel, plan: FaultPlan) -> None:
        self.frame_bytes, self.frames_at_once = inner.frame_bytes, inner.frames_at_once
        self._inner = inner
        self._plan = plan
        self._sent = 0
        self._held: bytes | None = None

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake."""
        self._inner.start(intake, closed)

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame, or what becomes of it."""
        kind = unpack(head[:HEADER_BYTES]).kind
        self._sent += kind in self._plan.kinds
        if kind not in _NEVER and self._is_half_closed():
            self._plan.done["half_close"] += 1
            return
        match self._plan.pick(kind):
            case "drop":
                return
            case "duplicate":
                await self._inner.send(head, parts)
                await self._inner.send(head, parts)
            case "reorder" if self._held is None:
                self._held = b"".join((head, *parts))
                return
            case "corrupt":
                await self._corrupt(b"".join((head, *parts)))
            case "delay":
                await asyncio.sleep(self._plan.delay_s)
                await self._inner.send(head, parts)
            case _:
                await self._inner.send(head, parts)
        if self._held is not None:
            held, self._held = self._held, None
            await self._inner.send(held)

    def close(self) -> None:
        """End the connection."""
        self._inner.close()

    def _is_half_closed(self) -> bool:
        limit = self._plan.half_close_after
        return limit is not None and self._sent > limit

    async def _corrupt(self, frame: bytes) -> None:
        if len(frame) > HEADER_BYTES:
            damaged = bytearray(frame)
            damaged[self._plan.random.randrange(HEADER_BYTES, len(frame))] ^= 1
            await self._inner.send(bytes(damaged))


class FaultyTransport:
    """Another transport, with a plan for what its channels send."""

    def __init__(self, inner: Transport, plan: FaultPlan) -> None:
        self.name = inner.name
        self._inner = inner
        self._plan = plan

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Listen."""
        return await self._inner.listen(lambda channel: accept(FaultyChannel(channel, self._plan)))

    async def dial(self, address: str) -> Channel:
        """Connect. Raises OSError."""
        return FaultyChannel(await self._inner.dial(address), self._plan)

    async def close(self) -> None:
        """Stop listening."""
        await self._inner.close()
