"""Frames: 64 bytes of header, then a body. The same on every transport.

    offset  bytes  field
         0      4  magic "QKV1"
         4      1  kind
         5      1  reserved, 0
         6      2  rank         the sending rank
         8      4  length       bytes of the body
        12      4  num          entries in the body's table, blocks of a grant, or in OPEN and a
                                sender's KEEP the leading blocks that it has ready
        16      8  transfer     number of the transfer, 0 on frames of the connection
        24      8  incarnation  of the receiving process, as the transfer's reference names it
        32      4  epoch
        36      4  first        first block of a grant
        40      8  sequence     of a DATA frame on its connection; an ACK or FENCED names it again
        48      8  xxh3_64 of the body, of DATA of its table alone; 0 without one and of PROBE
        56      8  xxh3_64 of the 56 bytes before

All integers little-endian. Body of DATA: a table of `num` entries (block u32, piece u32, xxh3_64
of the piece u64), then the pieces in the table's order, raw. Body of ACK: a table of the pieces to
send again, checksum 0; none when all were good.

A damaged piece is sent again. Damage anywhere else (a commit carries the first tokens) ends the
connection.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from quire.transfer.state import TransferRef

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"QKV1"
HEADER_BYTES = 64
MAX_BODY_BYTES = 4 << 20
"""A longer body is a damaged or foreign header."""
MAX_ENTRIES = 256
"""Pieces in one frame."""

_HEADER = struct.Struct("<4sBBHIIQQIIQQ")
_SUM = struct.Struct("<Q")
_ENTRY = struct.Struct("<IIQ")
ENTRY_BYTES = _ENTRY.size

# xxh3_64 rather than crc32c: the same cost with hardware crc32c (15 GB/s in cache), twice the bits.
checksum = xxhash.xxh3_64_intdigest


class Kind(IntEnum):
    """What a frame says. S = sender of blocks, R = receiver of blocks."""

    HELLO = 1  # both: who I am, what I can do (proto Hello)
    AUTH = 2  # dialler: proof that it knows the cluster's token
    REFUSE = 3  # acceptor: no link with you (proto Refusal)
    WELCOME = 4  # acceptor: the link stands
    PING = 5  # both: I am alive
    PROBE = 6  # dialler: measure; the body is thrown away
    PROBED = 7  # acceptor: the probe of that sequence arrived
    OPEN = 10  # S: here I am for this transfer; its first `num` blocks are ready
    GRANT = 11  # R: blocks [first, first + num) may be sent
    DATA = 12  # S: pieces
    ACK = 13  # R: pieces of that sequence verified, or to be sent again
    COMMIT = 14  # S: everything was sent (proto Commit)
    COMMITTED = 15  # R: and is kept
    FAIL = 16  # both: over, with the reason (proto Refusal)
    FENCED = 17  # R: I know no such transfer; nothing was copied
    KEEP = 18  # both: I still hold my side of this transfer; S: its first `num` blocks are ready
    LANDING = 20  # R: memory you may write into (proto KvLanding); one-sided transports only
    WRITER = 21  # S: who will write (proto KvWriter)
    LANDED = 22  # S: landing slot `first` holds the payload of the frame whose head is the body
    CREDIT = 23  # R: landing slot `first` may be written again


class Header(NamedTuple):
    """A frame's header."""

    kind: int
    rank: int = 0
    length: int = 0
    num: int = 0
    transfer: int = 0
    incarnation: int = 0
    epoch: int = 0
    first: int = 0
    sequence: int = 0
    body_sum: int = 0
    """Set by `pack`."""

    @property
    def ref(self) -> TransferRef:
        """The transfer that it is of."""
        return TransferRef(self.transfer, self.epoch, self.incarnation)


def header_of(kind: Kind, ref: TransferRef, **fields: int) -> Header:
    """The header of a frame of a transfer."""
    return Header(
        kind, transfer=ref.transfer, incarnation=ref.incarnation, epoch=ref.epoch, **fields
    )


class Entry(NamedTuple):
    """A piece of a block on the wire."""

    block: int
    piece: int
    checksum: int = 0


class FrameError(Exception):
    """Bytes that are no frame; the connection is of no more use."""


def pack(header: Header, body: bytes = b"") -> bytes:
    """The header and a body; `length` counts what follows the body too when it is given."""
    length = header.length or len(body)
    start = _HEADER.pack(
        MAGIC,
        header.kind,
        0,
        header.rank,
        length,
        header.num,
        header.transfer,
        header.incarnation,
        header.epoch,
        header.first,
        header.sequence,
        checksum(body) if body else 0,
    )
    return b"".join((start, _SUM.pack(checksum(start)), body))


def unpack(data: bytes | bytearray | memoryview) -> Header:
    """The header in 64 bytes. Raises FrameError."""
    (found,) = _SUM.unpack_from(data, 56)
    magic, kind, _, rank, length, num, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("not a frame of this protocol")
    if found != checksum(bytes(data[:56])):
        raise FrameError("damaged header")
    if length > MAX_BODY_BYTES or num * ENTRY_BYTES > max(length, MAX_BODY_BYTES):
        raise FrameError(f"a body of {length} bytes is too long")
    return Header(kind, rank, length, num, *rest)


def pack_entries(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """A table of pieces."""
    fields = tuple(chain.from_iterable(entries))
    return struct.pack("<" + "IIQ" * (len(fields) // 3), *fields)


def unpack_entries(table: bytes | bytearray | memoryview) -> list[Entry]:
    """Pieces of a table. Raises FrameError when it is cut short."""
    if len(table) % ENTRY_BYTES:
        raise FrameError("a table of pieces is cut short")
    return list(map(Entry._make, _ENTRY.iter_unpack(table)))


def digest(entries: Iterable[Entry]) -> int:
    """xxh3_64 over pieces with their checksums, whatever order they came in."""
    return checksum(pack_entries(sorted(entries)))
