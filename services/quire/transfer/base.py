"""KV transfer: the parts and how they fit.

Life of a transfer, prefill pod on the left, decode pod on the right:

    Endpoint.receive()                                   -> TransferRef; travels with the request
    Endpoint.send(ref, peer)   -- OPEN ------------->    PROMISED -> RECEIVING
                               <- GRANT ------------     Endpoint.grant(ref, first, slots)
    Endpoint.offer(ref, ...)   -- DATA ------------->    bytes to the blocks' places, verified
      Released(slots)          <- ACK --------------     Delivered(block, slot), once in the pool
      ... chunk by chunk while the next chunk computes, window by window ...
    Endpoint.commit(ref, ...)  -- COMMIT ----------->    counted, digest compared
      Ended                    <- COMMITTED ---------    Ended(commit)

Either side may cancel, at any time; a broken or silent connection, an expired lease or a damaged
block ends it too, on both sides, each giving back every block it holds. Who does what:

    Endpoint            one per rank: its own thread, links, listeners, timers; the caller's verbs
    Receiver, Sender    transfers of each direction; turn state machines' effects into frames
    Link                one connection: greeting, heartbeats, window, order of writing
    Intake              bytes into frames, pieces straight into the pool
    Transport, Channel  how bytes travel: tcp, grpc, nixl, local (in process), faults (wraps one)
    PoolMemory          where they come from and go to: the pool itself, or places beside a device's

All of it runs on the endpoint's thread, but for checksums that a sender has computed ahead. Blocks
and bytes are all it knows: no requests, no tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quire.transfer.flows import Flows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.intake import Intake
    from quire.transfer.memory import PoolMemory
    from quire.transfer.negotiate import Identity


class Channel(Protocol):
    """One connection's bytes, in order, both ways. Lives on the endpoint's thread."""

    frame_bytes: int
    """Most payload of a DATA frame that suits it."""
    frames_at_once: int
    """Calls of `send` that may be under way together. What they are of is written whole, in the
    order of the calls but for payloads that take their own way."""

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver what arrives to the intake; `closed(why)` once when the connection has ended.

        An intake's FrameError closes the channel.
        """

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """Send one frame. Returns when the parts' memory is no longer read.

        On a closed channel it returns and nothing is sent.
        """

    def close(self) -> None:
        """End the connection at once, dropping what is not sent. May be called again."""


class Transport(Protocol):
    """Makes channels."""

    name: str

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Start listening; `accept` gets each channel. Returns the address for `dial`."""

    async def dial(self, address: str) -> Channel:
        """Connect. Raises OSError."""

    async def close(self) -> None:
        """Stop listening and free what is held. Channels are closed before."""


class Unreachable(OSError):
    """No connection to that address, in a transport's own words."""


@dataclass
class Counters:
    """Since the start; written on the endpoint's thread, read anywhere."""

    flows: Flows = field(default_factory=Flows)
    """By direction, peer and transport: bytes, transfers by outcome, rates."""
    fenced_frames: int = 0
    """Frames of transfers not known here: late, of an old epoch or of another process."""
    duplicate_pieces: int = 0
    links: Counter[str] = field(default_factory=Counter)
    """Made, by transport."""
    quarantined_bytes: int = 0
    """Landing memory that a peer which vanished might still write into; never used again unless
    that same process says that nothing is in flight."""
    refused_links: int = 0
    """Not authenticated, incompatible or not speaking the protocol."""


@dataclass
class Node:
    """What every part of an endpoint shares."""

    identity: Identity
    config: TransferConfig
    memory: PoolMemory
    clock: Callable[[], float]
    """Seconds, monotonic."""
    counters: Counters = field(default_factory=Counters)
    listeners: list[tuple[str, str]] = field(default_factory=list)
