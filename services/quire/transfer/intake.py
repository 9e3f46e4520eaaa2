"""Bytes of a connection into frames; pieces of blocks straight into the pool.

Pull interface, so that a socket can read into the final place: `buffers()` says where the next
bytes go, `advance(n)` that n of them came. Whether the pieces may still go where they went is asked
before every read: the transfer may have been cancelled in between, and then the rest goes nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quire.transfer.frames import (
    ENTRY_BYTES,
    HEADER_BYTES,
    MAX_ENTRIES,
    Entry,
    FrameError,
    Header,
    Kind,
    checksum,
    unpack,
    unpack_entries,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

AHEAD_BYTES = 4 << 10
"""Read at once where frames begin: many of control, or head and table of one with data. What
pieces follow in it are copied, which is why it is not more."""
READ_BYTES = 256 << 10
"""Read at once where pieces are: they are in the cache still when they are verified."""
SCRATCH_BYTES = 256 << 10


class FrameHandler(Protocol):
    """What an intake feeds. May raise FrameError: the connection is then closed."""

    def on_frame(self, header: Header, body: bytes) -> None:
        """A frame other than DATA and PROBE is complete."""

    def places(self, header: Header, entries: Sequence[Entry]) -> list[memoryview] | None:
        """A DATA frame begins: where each of its pieces goes; None when it has no place here."""

    def holds(self) -> bool:
        """Whether the places of the frame may still be written into."""

    def landed(self, number: int) -> None:
        """The piece of this number was written to its place, which held all the while."""

    def finished(self, header: Header) -> None:
        """The frame, DATA or PROBE, is complete."""


class Intake:
    """See the module. One per connection."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._header = Header(0)
        self._target = self._head
        """Head, table or body being filled, up to `_filled`; while there are places, that is how
        far the one of piece `_piece` is filled."""
        self._filled = 0
        self._places: list[memoryview] = []
        self._piece = 0
        self._discard = 0
        """Bytes of the frame still to be thrown away."""

    @property
    def missing(self) -> int:
        """Bytes of the frame's pieces that are still to come; 0 where none are expected."""
        if not self._places:
            return self._discard
        return sum(map(len, self._places[self._piece :])) - self._filled

    # ---- for sockets

    def buffers(self) -> list[memoryview]:
        """Where the next bytes go, one after the other; never empty."""
        if not self._pieces_may_land():
            return [self._scratch[: self._discard]] if self._discard else [self._ahead]
        buffers = [self._places[self._piece][self._filled :]]
        room = len(buffers[0])
        for place in self._places[self._piece + 1 :]:
            if room >= READ_BYTES:
                return buffers
            buffers.append(place)
            room += len(place)
        return [*buffers, self._ahead]

    def advance(self, count: int) -> None:
        """`count` bytes were written into the last buffers. Raises FrameError."""
        if self._discard:
            self._throw_away(count)
            return
        while self._places and count:
            step = min(len(self._places[self._piece]) - self._filled, count)
            count -= step
            self._fill_piece(step)
        if count:
            self.feed(self._ahead[:count])

    # ---- for whole messages

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes that are in memory already. Raises FrameError."""
        view = memoryview(data)
        while view:
            if self._pieces_may_land():
                target = self._places[self._piece][self._filled :]
            else:
                target = self._target[self._filled :]
            count = min(self._discard or len(target), len(view))
            if self._discard:
                self._throw_away(count)
            else:
                target[:count] = view[:count]
                self._fill_piece(count) if self._places else self._fill_target(count)
            view = view[count:]

    # ----

    def _pieces_may_land(self) -> bool:
        """There are pieces to come and they have a place; when that is gone, the rest has none."""
        if self._places and not self._handler.holds():
            self._discard = sum(map(len, self._places[self._piece :])) - self._filled
            self._places = []
        return bool(self._places)

    def _throw_away(self, count: int) -> None:
        self._discard -= count
        if not self._discard:
            self._end_frame()

    def _fill_target(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._target):
            self._begin_body() if self._target is self._head else self._end_body()

    def _fill_piece(self, count: int) -> None:
        self._filled += count
        if self._filled < len(self._places[self._piece]):
            return
        self._handler.landed(self._piece)
        self._piece += 1
        self._filled = 0
        if self._piece == len(self._places):
            self._end_frame()

    def _begin_body(self) -> None:
        self._header = header = unpack(self._head)
        if header.kind == Kind.PROBE and header.length:
            self._discard = header.length
            return
        wanted = header.length
        if header.kind == Kind.DATA:
            wanted = header.num * ENTRY_BYTES
            if not 0 < header.num <= MAX_ENTRIES or wanted > header.length:
                raise FrameError("a DATA frame without a table")
        if not wanted:
            self._handler.on_frame(header, b"")
            self._next_frame()
            return
        self._target, self._filled = memoryview(bytearray(wanted)), 0

    def _end_body(self) -> None:
        header = self._header
        if checksum(self._target) != header.body_sum:
            raise FrameError("damaged body")
        if header.kind == Kind.DATA:
            self._begin_pieces(header)
        else:
            self._handler.on_frame(header, bytes(self._target))
            self._next_frame()

    def _begin_pieces(self, header: Header) -> None:
        places = self._handler.places(header, unpack_entries(self._target))
        rest = header.length - len(self._target)
        if places is not None and sum(map(len, places)) != rest:
            raise FrameError("a DATA frame whose length does not fit its pieces")
        if places:
            self._places = places
            self._piece = self._filled = 0
            return
        self._discard = rest
        if not rest:
            self._end_frame()

    def _end_frame(self) -> None:
        self._places = []
        self._handler.finished(self._header)
        self._next_frame()

    def _next_frame(self) -> None:
        self._target, self._filled = self._head, 0
