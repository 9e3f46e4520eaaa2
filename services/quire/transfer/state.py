"""What both sides of a transfer share: its name, why it can fail, what the caller is told.

A transfer is two state machines, one on each side, that know nothing of sockets or threads:

    receiving.ReceivingTransfer   the decode side: promise, then bind blocks, verify, deliver
    sending.SendingTransfer       the prefill side: offer blocks as they are computed, release them

Each input returns what must be done: `Event`s for the caller, `Reply`s for the peer, `Errand`s for
this side's memory. The rules that the property tests hold them to, whatever the order of inputs:

    every block granted to a receiving transfer comes back exactly once: Delivered or Released
    every block offered to a sending transfer comes back exactly once: Released
    every place that either was given is vacated exactly once, and not while it is copied
    after its last block each side says Ended once, and then never anything again
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple


class TransferRef(NamedTuple):
    """Names one attempt at one transfer into one process. Made by the receiver.

    All three parts are checked before a byte is copied: a later attempt has a higher epoch, a
    restarted process another incarnation.
    """

    transfer: int
    epoch: int
    incarnation: int


def new_number() -> int:
    """A random 64-bit number for a transfer or an incarnation; never 0."""
    return secrets.randbits(64) or 1


class Failure(StrEnum):
    """Why a transfer ended without its blocks; also the label of the metric."""

    CANCELLED = "cancelled"  # the caller of this side
    PEER_CANCELLED = "peer_cancelled"
    LEASE = "lease"  # nothing was heard for the lease, or nothing moved
    LOST = "lost"  # the connection broke, or the peer went silent
    CHECKSUM = "checksum"  # a piece was damaged twice
    INCOMPLETE = "incomplete"  # a commit that does not fit what arrived
    FENCED = "fenced"  # the receiver knows no such transfer (any more)
    INCOMPATIBLE = "incompatible"  # other layout, version or cluster: prefill locally
    UNREACHABLE = "unreachable"  # no transport led to the peer
    PROTOCOL = "protocol"  # the peer did what it must not
    MEMORY = "memory"  # a copy into or out of the pool failed


class FailureCode(IntEnum):
    """`Failure` on the wire. Unknown numbers read as PEER_CANCELLED."""

    CANCELLED = 1
    LEASE = 2
    CHECKSUM = 3
    INCOMPLETE = 4
    PROTOCOL = 5
    LOST = 6


@dataclass(frozen=True)
class Commit:
    """The sender's word that everything was sent; without it nothing is a success."""

    blocks: int
    """Blocks 0 .. blocks - 1 were sent."""
    tokens: int
    """Tokens in them; the last block may be partly filled."""
    meta: bytes = b""
    """The caller's own: first token, log-probabilities. Opaque here."""
    digest: int = 0
    """`frames.digest` over this sender's pieces; filled in by the sending side."""


# ---- Events: to the caller


@dataclass(frozen=True)
class Delivered:
    """Receiver: every byte of the block verified. The block is the caller's."""

    ref: TransferRef
    block: int
    """Place in the transfer."""
    slot: int
    """Block of the pool."""


@dataclass(frozen=True)
class Released:
    """Blocks that are the caller's again.

    Receiver: granted, and will not be filled; their bytes are undefined. Sender: offered, and no
    longer read.
    """

    ref: TransferRef
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """The last event of a transfer. `failure` None is success, on both sides the same word."""

    ref: TransferRef
    failure: Failure | None = None
    detail: str = ""
    commit: Commit | None = None
    """What the sender committed; on success only."""


Event = Delivered | Released | Ended


# ---- Replies: to the peer


@dataclass(frozen=True)
class Open:
    """S -> R: here I am for this transfer."""

    num_offered: int = 0
    """As in Offered."""


@dataclass(frozen=True)
class Offered:
    """S -> R: the first `count` blocks are computed, and come as soon as they are granted."""

    count: int


@dataclass(frozen=True)
class Grant:
    """R -> S: these blocks may be sent."""

    first: int
    count: int


@dataclass(frozen=True)
class Resend:
    """R -> S: this piece arrived damaged; once more."""

    block: int
    piece: int


@dataclass(frozen=True)
class Committing:
    """S -> R: everything was sent and acknowledged."""

    commit: Commit


@dataclass(frozen=True)
class Committed:
    """R -> S: everything arrived and is kept."""


@dataclass(frozen=True)
class Fail:
    """Either way: over."""

    failure: Failure
    detail: str = ""


Message = Open | Offered | Grant | Resend | Committing | Committed | Fail


@dataclass(frozen=True)
class Reply:
    """A message to one sending rank (receiver) or to the receiver (sender; rank is -1)."""

    rank: int
    message: Message


# ---- Errands: to this side's memory, see `memory.PoolMemory`


@dataclass(frozen=True)
class Load:
    """Sender: have blocks of the pool read into their places; then `loaded`."""

    blocks: tuple[int, ...]
    """Of the transfer."""
    slots: tuple[int, ...]
    places: tuple[int, ...]


class Store(NamedTuple):
    """Receiver: the block is verified at its place; write it into the pool and vacate the place,
    then `stored`."""

    block: int
    """Of the transfer."""
    slot: int
    place: int


@dataclass(frozen=True)
class Vacate:
    """Nothing of this transfer is read or written at these places any more."""

    places: tuple[int, ...]


Effect = Event | Reply | Load | Store | Vacate


class Lease:
    """Seconds until something must have happened. The clock is the caller's."""

    def __init__(self, length_s: float, now: float) -> None:
        self.length_s = length_s
        self.deadline = now + length_s

    def renew(self, now: float) -> None:
        """It happened."""
        self.deadline = now + self.length_s

    def expired(self, now: float) -> bool:
        """It did not happen in time."""
        return now >= self.deadline
