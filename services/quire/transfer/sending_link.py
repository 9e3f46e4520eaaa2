"""The link to a receiver of blocks: frames of its transfers in turn, and what is unacknowledged.

Transfers take turns frame by frame; at most a window of bytes is unacknowledged, so that control
never waits behind more than that. While one frame is handed to the channel, the next one's
checksums are computed on a thread of their own: reading blocks that nobody has read since they were
computed takes a quarter of the time that sending them does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from quire.transfer.frames import (
    MAX_ENTRIES,
    Header,
    Kind,
    checksum,
    header_of,
    pack,
    pack_entries,
    unpack_entries,
)
from quire.transfer.link import DialledLink, Outgoing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from concurrent.futures import Future

    from quire.transfer.base import Channel, Node
    from quire.transfer.flows import Flow
    from quire.transfer.sender import Departing, Sender
    from quire.transfer.sending import Piece


@dataclass(frozen=True)
class _Frame:
    """Pieces that were taken to be written together."""

    departing: Departing
    pieces: list[Piece]
    views: tuple[memoryview, ...]
    num_bytes: int


class SendingLink(DialledLink):
    """Frames to one receiving rank."""

    def __init__(self, channel: Channel, transport: str, node: Node, sender: Sender) -> None:
        self.sender = sender
        self.probes: dict[int, asyncio.Future[None]] = {}
        """Sequence of a PROBE -> resolved when it arrived."""
        self._departing: deque[Departing] = deque()
        self._next_frame: tuple[_Frame, Future[list[int]]] | None = None
        """Taken ahead, and its checksums."""
        self._sent: dict[int, _Frame] = {}
        """Sequence of a DATA frame that is not acknowledged -> what was in it."""
        self._unacked_bytes = 0
        self._sequence = 0
        self._busy_since = 0.0
        """While something is unacknowledged: since when that is not in `flow` yet."""
        super().__init__(channel, transport, node)

    @cached_property
    def flow(self) -> Flow:
        """What goes over it, beside other links like it. Known after the greeting."""
        return self.node.counters.flows.of("sent", self.peer.worker, self.transport)

    def add(self, departing: Departing) -> None:
        """Take turns with the others from now on."""
        self._departing.append(departing)

    def remove(self, departing: Departing) -> None:
        """The transfer is over: nothing of it is sent or awaited any more."""
        self._departing.remove(departing)
        for sequence, sent in list(self._sent.items()):
            if sent.departing is departing:
                self._settle(sequence)

    def next_sequence(self) -> int:
        """A number for a frame that will be answered."""
        self._sequence += 1
        return self._sequence

    # ---- writing

    def next_data(self) -> Outgoing | None:
        """The next frame of the transfer whose turn it is, if the window allows one."""
        ahead, self._next_frame = self._next_frame, None
        if ahead is not None and not ahead[0].departing.machine.is_live:
            self._written(ahead[0])  # which it never will be
            ahead = None
        frame = self._take() if ahead is None else ahead[0]
        if frame is None:
            return None
        sums = _sum(frame.views) if ahead is None else ahead[1].result()
        outgoing = self._data(frame, sums)
        if (following := self._take()) is not None:
            self._next_frame = following, self.sender.helper.submit(_sum, following.views)
        return outgoing

    def _take(self) -> _Frame | None:
        if self._unacked_bytes >= self.node.config.kv_window_bytes:
            return None
        for _ in range(len(self._departing)):
            departing = self._departing[0]
            self._departing.rotate(-1)
            if departing.machine.has_pieces:
                return self._frame(departing)
        return None

    def _frame(self, departing: Departing) -> _Frame:
        view, parts = self.node.memory.view, departing.parts
        pieces, views = [], []
        for piece, place in departing.machine.take(self.frame_bytes, MAX_ENTRIES):
            part = parts[piece[1]]
            pieces.append(piece)
            views.append(view(place, part.source, part.length))
        return _Frame(departing, pieces, tuple(views), sum(map(len, views)))

    def _data(self, frame: _Frame, sums: list[int]) -> Outgoing:
        machine = frame.departing.machine
        summed = list(zip(frame.pieces, sums, strict=True))
        machine.summed(summed)
        table = pack_entries((*piece, value) for piece, value in summed)
        sequence = self.next_sequence()
        self._sent[sequence] = frame
        if not self._unacked_bytes:
            self._busy_since = self.node.clock()
        self._unacked_bytes += frame.num_bytes
        self.flow.num_bytes += frame.num_bytes
        header = header_of(
            Kind.DATA,
            machine.ref,
            rank=self.node.identity.shard.rank,
            length=len(table) + frame.num_bytes,
            num=len(sums),
            sequence=sequence,
        )
        return Outgoing(pack(header, table), frame.views, lambda: self._written(frame))

    def _written(self, frame: _Frame) -> None:
        """Nothing reads the frame's pieces any more."""
        effects = frame.departing.machine.written(frame.pieces, self.node.clock())
        self.sender.do(frame.departing, effects)

    # ---- reading

    def on_transfer_frame(self, header: Header, body: bytes) -> None:
        """Answers of the receiver."""
        if header.kind == Kind.PROBED:
            if (future := self.probes.pop(header.sequence, None)) is not None:
                future.set_result(None)
        elif header.kind == Kind.ACK:
            self._on_ack(header, body)
        else:
            self._settle(header.sequence)
            self.sender.on_frame(header, body)

    def on_lost(self) -> None:
        """Every transfer on this link is lost."""
        for future in self.probes.values():
            future.cancel()
        self._next_frame = None
        for departing in list(self._departing):
            self.sender.do(departing, departing.machine.lost())

    def _on_ack(self, header: Header, body: bytes) -> None:
        sent = self._settle(header.sequence)
        if sent is None:
            return  # of a transfer that is over
        self.flow.acknowledged(sent.num_bytes)
        machine, good = sent.departing.machine, sent.pieces
        damaged = {(entry.block, entry.piece) for entry in unpack_entries(body)}
        if damaged:
            self.flow.damaged_pieces += len(damaged)
            good = [piece for piece in good if piece not in damaged]
        self.sender.do(sent.departing, machine.acked(good, self.node.clock()))
        if damaged:
            self.sender.do(sent.departing, machine.damaged(damaged))

    def _settle(self, sequence: int) -> _Frame | None:
        """The frame is answered: its bytes leave the window."""
        sent = self._sent.pop(sequence, None)
        if sent is not None:
            self._unacked_bytes -= sent.num_bytes
            now = self.node.clock()
            self.flow.busy(now - self._busy_since)
            self._busy_since = now
        return sent


def _sum(views: Sequence[memoryview]) -> list[int]:
    return list(map(checksum, views))
