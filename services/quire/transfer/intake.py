"""Bytes of a connection into frames; pieces of blocks straight into the pool.

Pull interface, so that a socket can read into the final place: `buffer()` says where the next bytes
go, `advance(n)` that n of them came. Where a piece goes is asked again for every read: the transfer
may have been cancelled in between, and then the rest goes nowhere.
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

SCRATCH_BYTES = 256 << 10


class FrameHandler(Protocol):
    """What an intake feeds. May raise FrameError: the connection is then closed."""

    def on_frame(self, header: Header, body: bytes) -> None:
        """A frame other than DATA and PROBE is complete."""

    def lengths(self, header: Header, entries: Sequence[Entry]) -> list[int] | None:
        """A DATA frame begins: the length of each of its pieces, None when it has no place here."""

    def place(self, header: Header, entry: Entry) -> memoryview | None:
        """Where the piece lies now; None for nowhere."""

    def landed(self, header: Header, entry: Entry, good: bool) -> None:
        """A piece was written where `place` said all the while."""

    def finished(self, header: Header) -> None:
        """The frame, DATA or PROBE, is complete."""


class Intake:
    """See the module. One per connection."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._header = Header(0)
        self._target: memoryview = self._head
        """Being filled, up to `_filled`; pieces use `_place` instead."""
        self._filled = 0
        self._discard = 0
        """Bytes of the frame still to be thrown away."""
        self._entries: list[Entry] = []
        self._lengths: list[int] = []
        self._piece = 0
        self._diverted = False

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._discard:
            return self._scratch[: self._discard]
        if not self._entries:
            return self._target[self._filled :]
        length = self._lengths[self._piece]
        if not self._diverted:
            place = self._handler.place(self._header, self._entries[self._piece])
            if place is not None:
                return place[self._filled :]
            self._diverted = True
        return self._scratch[: length - self._filled]

    def advance(self, count: int) -> None:
        """`count` bytes were written into the last buffer. Raises FrameError."""
        if self._discard:
            self._discard -= count
            if not self._discard:
                self._end_frame()
            return
        self._filled += count
        if self._entries:
            if self._filled == self._lengths[self._piece]:
                self._end_piece()
        elif self._filled == len(self._target):
            if self._target is self._head:
                self._begin_body()
            else:
                self._end_body()

    def feed(self, data: bytes | memoryview) -> None:
        """The same for bytes that are already in memory. Raises FrameError."""
        view = memoryview(data)
        while view:
            target = self.buffer()
            count = min(len(target), len(view))
            target[:count] = view[:count]
            self.advance(count)
            view = view[count:]

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
        if header.kind != Kind.DATA:
            self._handler.on_frame(header, bytes(self._target))
            self._next_frame()
            return
        entries = unpack_entries(self._target)
        lengths = self._handler.lengths(header, entries)
        rest = header.length - len(self._target)
        if lengths is None:
            self._discard = rest
            if not rest:
                self._end_frame()
            return
        if sum(lengths) != rest:
            raise FrameError("a DATA frame whose length does not fit its pieces")
        self._entries, self._lengths = entries, lengths
        self._piece = self._filled = 0
        self._diverted = False

    def _end_piece(self) -> None:
        entry = self._entries[self._piece]
        if not self._diverted:
            place = self._handler.place(self._header, entry)
            if place is not None:
                good = checksum(place) == entry.checksum
                self._handler.landed(self._header, entry, good)
        self._piece += 1
        self._filled = 0
        self._diverted = False
        if self._piece == len(self._entries):
            self._end_frame()

    def _end_frame(self) -> None:
        self._handler.finished(self._header)
        self._next_frame()

    def _next_frame(self) -> None:
        self._target, self._filled = self._head, 0
        self._entries = []
