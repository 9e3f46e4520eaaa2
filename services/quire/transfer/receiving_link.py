"""The link that a sender of blocks opened: places for what arrives, checks, acknowledgements."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quire.transfer.frames import (
    Entry,
    FrameError,
    Header,
    Kind,
    checksum,
    header_of,
    pack_entries,
)
from quire.transfer.layout import PIECE_BYTES
from quire.transfer.link import AcceptedLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.transfer.base import Channel, Node
    from quire.transfer.flows import Flow
    from quire.transfer.receiver import Incoming, Receiver


@dataclass
class _Arriving:
    """A DATA frame whose pieces are on their way."""

    incoming: Incoming
    entries: Sequence[Entry]
    places: list[memoryview] = field(default_factory=list)
    unwanted: set[int] = field(default_factory=set)
    """Numbers of pieces that go nowhere."""
    is_fenced: bool = False
    """Some of those were never granted."""
    landed: list[tuple[Entry, bool]] = field(default_factory=list)
    """Pieces that arrived, and whether they are good."""


class ReceivingLink(AcceptedLink):
    """Frames from one sending rank."""

    def __init__(self, channel: Channel, transport: str, node: Node, receiver: Receiver) -> None:
        self._receiver = receiver
        self._arriving: _Arriving | None = None
        """The current frame; None when it is fenced as a whole."""
        self._nowhere = memoryview(bytearray(PIECE_BYTES))
        super().__init__(channel, transport, node)

    def on_transfer_frame(self, header: Header, body: bytes) -> None:
        """OPEN, COMMIT, FAIL, KEEP; an empty PROBE measures latency."""
        if header.kind == Kind.PROBE:
            self.post(Header(Kind.PROBED, sequence=header.sequence))
        else:
            self._receiver.on_frame(self, header, body)

    @cached_property
    def flow(self) -> Flow:
        """What came over it, beside other links like it. Known after the greeting."""
        return self.node.counters.flows.of("received", self.peer.worker, self.transport)

    def on_lost(self) -> None:
        """Every leg on this link is lost."""
        self._receiver.lost(self)

    # ---- FrameHandler, for DATA

    def places(self, header: Header, entries: Sequence[Entry]) -> list[memoryview] | None:
        """Where the pieces go; None when the frame is fenced."""
        if not self.is_ready:
            raise FrameError("data before the greeting")
        self._arriving = None
        incoming = self._receiver.find(header)
        if incoming is None or incoming.links.get(self.peer_shard.rank) is not self:
            return None
        if len({entry[:2] for entry in entries}) < len(entries):
            raise FrameError("a piece twice in one frame")
        self._arriving = arriving = _Arriving(incoming, entries)
        for number, entry in enumerate(entries):
            arriving.places.append(self._place(arriving, number, entry))
        return arriving.places

    def _place(self, arriving: _Arriving, number: int, entry: Entry) -> memoryview:
        incoming, rank = arriving.incoming, self.peer_shard.rank
        parts = incoming.legs[rank]
        if entry.piece >= len(parts):
            raise FrameError("a piece that the block does not have")
        part = parts[entry.piece]
        slot = incoming.machine.place(rank, entry.block, entry.piece)
        if slot is not None:
            return self.node.memory.view(slot, part.destination, part.length)
        if incoming.machine.knows(rank, entry.block, entry.piece):
            self.node.counters.duplicate_pieces += 1
        else:
            arriving.is_fenced = True
        arriving.unwanted.add(number)
        return self._nowhere[: part.length]

    def holds(self) -> bool:
        """Places are bound until their block is delivered, which only the end of this frame does,
        or the transfer is over."""
        arriving = self._arriving
        return (
            arriving is not None
            and arriving.incoming.machine.is_live
            and arriving.incoming.links.get(self.peer_shard.rank) is self
        )

    def landed(self, number: int) -> None:
        """A piece was written into its place: verify it while it is in the cache."""
        arriving = self._arriving
        if arriving is None or number in arriving.unwanted:
            return
        entry = arriving.entries[number]
        good = checksum(arriving.places[number]) == entry.checksum
        arriving.landed.append((entry, good))

    def finished(self, header: Header) -> None:
        """Acknowledge the frame: what is not to be sent again was verified."""
        if header.kind != Kind.DATA:
            super().finished(header)
            return
        arriving, again = self._arriving, list[Entry]()
        if arriving is not None and self.holds():
            again = self._receiver.landed(arriving.incoming, self, arriving.landed)
        if arriving is None or arriving.is_fenced or not self.holds():
            self._receiver.fence(self, header)
            return
        reply = header_of(Kind.ACK, header.ref, num=len(again), sequence=header.sequence)
        self.post(reply, pack_entries(again))
