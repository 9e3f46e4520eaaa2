"""Receiving side of one transfer, as a pure state machine.

Life: the caller promises (this object), a sender of each source rank opens its leg, the caller
grants blocks window by window, each gets a place to land at, pieces arrive and are verified there,
whole blocks are stored in the pool, each leg commits.

    PROMISED   accounted for by the caller; no sender yet. Blocks may be bound already
    RECEIVING  at least one leg is open; blocks bound, filled, stored, delivered
    DRAINING   over for the peers; some verified blocks are still being stored
    COMMITTED  every leg's commit fits what arrived, and it is stored; nothing is held
    FAILED     over; every block not delivered was released; late pieces have nowhere to go

    input \\ state   PROMISED              RECEIVING                  DRAINING        COMMITTED,
                                                                                     FAILED
    grant           wait for a place      wait for a place           release         release
    placed          bind, tell no one     bind, Grant to open legs   -               -
    opened(leg)     -> RECEIVING, Grants  Grants so far              (fenced)        (fenced)
    offered(leg)    -                     more are ready for places  nothing         nothing
    place(piece)    None: fenced          place, or None: known      None            None
    landed good     -                     block complete: Store      nothing         nothing
    landed damaged  -                     1st: Resend. 2nd: fails    nothing         nothing
    stored          -                     Delivered. All committed   Delivered;      -
                                          and stored: -> COMMITTED   last: -> FAILED
    commit(leg)     fails                 fits, all committed and    nothing         nothing
                                          stored: -> COMMITTED
                                          does not fit: fails
    peer fails,     -> DRAINING while blocks are being stored, else  nothing         nothing
    leg lost,       -> FAILED
    cancel, lease

A crash of the sender's process is `lost`; of this process, a new incarnation that knows nothing of
the transfer, so that what still arrives is fenced. A failure tells the other legs. A place is
written into only while `place` names it, which is asked again for every read: a cancel in the
middle of a frame diverts the rest of it. A block of the pool is written into only between Store
and `stored`, and comes back only after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from quire.transfer.frames import Entry, digest
from quire.transfer.state import (
    Commit,
    Committed,
    Delivered,
    Effect,
    Ended,
    Fail,
    Failure,
    Grant,
    Lease,
    Released,
    Reply,
    Resend,
    Store,
    TransferRef,
    Vacate,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

MAX_ATTEMPTS = 2
"""A piece damaged this often fails the transfer."""


class ReceivingState(StrEnum):
    """See the module's table."""

    PROMISED = "promised"
    RECEIVING = "receiving"
    DRAINING = "draining"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass
class _Binding:
    """A block on its way that has a place."""

    slot: int
    place: int
    missing: set[tuple[int, int]]
    """(rank, piece) not verified yet."""


@dataclass
class _Leg:
    """One source rank."""

    num_pieces: int
    """Of each block."""
    is_open: bool = False
    num_offered: int = 0
    """Leading blocks of the transfer that it has computed."""
    commit: Commit | None = None
    verified: dict[tuple[int, int], int] = field(default_factory=dict)
    """(block, piece) -> checksum."""


class ReceivingTransfer:
    """See the module. `legs`: source rank -> pieces that it sends of each block."""

    def __init__(
        self, ref: TransferRef, num_blocks: int, legs: Mapping[int, int], lease: Lease
    ) -> None:
        if num_blocks < 1 or not legs:
            raise ValueError("a transfer has at least one block and one sender")
        self.ref = ref
        self.num_blocks = num_blocks
        self.state = ReceivingState.PROMISED
        self.lease = lease
        self._legs = {rank: _Leg(count) for rank, count in legs.items()}
        self.num_ready = 0
        """How many of `unplaced`, from the first on, every sender has computed."""
        self._unplaced: dict[int, int] = {}  # block -> slot, granted and without a place
        self._bound: dict[int, _Binding] = {}
        self._storing: dict[int, int] = {}  # block -> slot, verified, on their way into the pool
        self._granted: set[int] = set()  # by the caller
        self._told: set[int] = set()  # to the senders
        self._damaged: dict[tuple[int, int, int], int] = {}
        self._is_committed = False  # by every leg
        self._ended = Ended(ref)

    @property
    def is_live(self) -> bool:
        """The peers have a part in it."""
        return self.state in (ReceivingState.PROMISED, ReceivingState.RECEIVING)

    @property
    def is_over(self) -> bool:
        """Nothing is held and nothing will be said any more."""
        return self.state in (ReceivingState.COMMITTED, ReceivingState.FAILED)

    @property
    def open_ranks(self) -> list[int]:
        """Source ranks whose sender is there."""
        return [rank for rank, leg in self._legs.items() if leg.is_open]

    def grants(self) -> list[Grant]:
        """Every grant so far; to a sender that has them they say nothing new."""
        return [Grant(first, count) for first, count in _runs(self._told)]

    @property
    def unplaced(self) -> Collection[int]:
        """Blocks of the pool that were granted and wait for a place to land at, in order."""
        return self._unplaced.values()

    def sent_by(self, legs: Mapping[int, int]) -> None:
        """Who sends is known now: before the first leg opens, whatever was assumed is dropped."""
        if self.state is not ReceivingState.PROMISED:
            return
        self._legs = {rank: _Leg(count) for rank, count in legs.items()}
        for binding in self._bound.values():
            binding.missing = self._wanted()

    def _wanted(self) -> set[tuple[int, int]]:
        """(rank, piece) of a block."""
        return {(rank, p) for rank, leg in self._legs.items() for p in range(leg.num_pieces)}

    # ---- the caller

    def grant(self, first: int, slots: Sequence[int]) -> list[Effect]:
        """Bind blocks [first, first + len(slots)) of the transfer to blocks of the pool, as soon
        as they have places: see `unplaced`.

        Raises ValueError when a block is granted twice or was not promised; nothing is bound then.
        """
        if not slots:
            return []
        if not self.is_live:
            return [Released(self.ref, tuple(slots))]
        blocks = range(first, first + len(slots))
        if first < 0 or blocks.stop > self.num_blocks:
            raise ValueError(f"blocks {blocks} of a transfer of {self.num_blocks}")
        if not self._granted.isdisjoint(blocks):
            raise ValueError(f"some of blocks {blocks} are granted already")
        self._unplaced.update(zip(blocks, slots, strict=True))
        self._granted.update(blocks)
        self._count_ready()
        return []

    def cancel(self) -> list[Effect]:
        """The caller gives up."""
        return self._fail(Failure.CANCELLED)

    # ---- this side's memory

    def placed(self, places: Sequence[int]) -> list[Effect]:
        """The first of `unplaced` have these places: the senders may send them."""
        blocks = list(islice(self._unplaced, len(places)))
        for block, place in zip(blocks, places, strict=True):
            self._bound[block] = _Binding(self._unplaced.pop(block), place, self._wanted())
        self.num_ready = max(self.num_ready - len(blocks), 0)
        self._told.update(blocks)
        runs = _runs(blocks)
        return [Reply(rank, Grant(*run)) for run in runs for rank in self.open_ranks]

    def stored(self, block: int, error: str = "") -> list[Effect]:
        """A verified block is in the pool, or why it could not get there; its place is vacated."""
        slot = self._storing.pop(block)
        if error:
            released = Released(self.ref, (slot,))
            return [released, *self._fail(Failure.MEMORY, error), *self._maybe_end()]
        return [Delivered(self.ref, block, slot), *self._maybe_end()]

    # ---- the peers

    def opened(self, rank: int, now: float) -> list[Effect]:
        """The sender of a source rank is there; repeated OPENs get the grants again."""
        if not self.is_live:
            return []
        leg = self._legs.get(rank)
        if leg is None:
            return self._fail(Failure.PROTOCOL, f"rank {rank} has nothing to send here")
        leg.is_open = True
        self.state = ReceivingState.RECEIVING
        self.lease.renew(now)
        return [Reply(rank, grant) for grant in self.grants()]

    def heard(self, now: float) -> None:
        """A sender said that it still holds its side."""
        self.lease.renew(now)

    def offered(self, rank: int, count: int) -> None:
        """A sender has computed the first `count` blocks; what it said before counts too."""
        if (leg := self._legs.get(rank)) is not None:
            leg.num_offered = max(leg.num_offered, count)
            self._count_ready()

    def place(self, rank: int, block: int, piece: int) -> int | None:
        """Where this piece may be written now; None for nowhere."""
        binding = self._bound.get(block)
        if binding is None or rank not in self._legs or not self._legs[rank].is_open:
            return None
        return binding.place if (rank, piece) in binding.missing else None

    def knows(self, rank: int, block: int, piece: int) -> bool:
        """The piece was verified before: a duplicate."""
        leg = self._legs.get(rank)
        return leg is not None and (block, piece) in leg.verified

    def landed(self, rank: int, entry: Entry, good: bool, now: float) -> list[Effect]:
        """A piece was written where `place` said; `good` when its checksum fits."""
        binding = self._bound.get(entry.block)
        if binding is None or (rank, entry.piece) not in binding.missing:
            return []
        self.lease.renew(now)
        if not good:
            return self._mend(rank, entry)
        binding.missing.discard((rank, entry.piece))
        self._legs[rank].verified[entry.block, entry.piece] = entry.checksum
        if binding.missing:
            return []
        del self._bound[entry.block]
        self._storing[entry.block] = binding.slot
        return [Store(entry.block, binding.slot, binding.place)]

    def commit(self, rank: int, commit: Commit, now: float) -> list[Effect]:
        """A sender says that it sent everything."""
        leg = self._legs.get(rank)
        if not self.is_live or leg is None:
            return []
        self.lease.renew(now)
        if (problem := self._misfit(leg, commit)) is not None:
            return self._fail(Failure.INCOMPLETE, f"rank {rank}: {problem}")
        leg.commit = commit
        self._is_committed = all(other.commit is not None for other in self._legs.values())
        return self._maybe_end()

    def refused(self, failure: Failure, detail: str = "") -> list[Effect]:
        """A sender gave up."""
        return self._fail(failure, detail)

    def lost(self, rank: int) -> list[Effect]:
        """The connection to a sender broke. An end of stream is never a success."""
        return self._fail(Failure.LOST, f"the connection to rank {rank} ended", silent=rank)

    def expire(self, now: float) -> list[Effect]:
        """Fail when nothing was heard for the lease."""
        if not self.is_live or not self.lease.expired(now):
            return []
        return self._fail(Failure.LEASE, f"nothing heard for {self.lease.length_s:g} s")

    # ----

    def _mend(self, rank: int, entry: Entry) -> list[Effect]:
        key = (rank, entry.block, entry.piece)
        self._damaged[key] = self._damaged.get(key, 0) + 1
        if self._damaged[key] < MAX_ATTEMPTS:
            return [Reply(rank, Resend(entry.block, entry.piece))]
        return self._fail(Failure.CHECKSUM, f"block {entry.block} arrived damaged twice")

    def _misfit(self, leg: _Leg, commit: Commit) -> str | None:
        expected = commit.blocks * leg.num_pieces
        if not leg.is_open:
            return "commit of a sender that never opened"
        if not 1 <= commit.blocks <= self.num_blocks:
            return f"commit of {commit.blocks} blocks, promised were {self.num_blocks}"
        if len(leg.verified) != expected:
            return f"{len(leg.verified)} of {expected} pieces arrived"
        others = [o.commit for o in self._legs.values() if o.commit is not None]
        if any((o.blocks, o.tokens) != (commit.blocks, commit.tokens) for o in others):
            return "the ranks do not agree"
        arrived = digest(Entry(*piece, value) for piece, value in leg.verified.items())
        return None if arrived == commit.digest else "the digest does not fit"

    def _count_ready(self) -> None:
        offered = min(leg.num_offered for leg in self._legs.values())
        self.num_ready = sum(1 for _ in takewhile(lambda b: b < offered, self._unplaced))

    def _maybe_end(self) -> list[Effect]:
        """The end, good or bad, once nothing is written into the pool any more."""
        if self._storing:
            return []
        if self.state is ReceivingState.DRAINING:
            self.state = ReceivingState.FAILED
            return [self._ended]
        if not (self._is_committed and self.is_live):
            return []
        self.state = ReceivingState.COMMITTED
        first = self._legs[min(self._legs)].commit
        confirmations = [Reply(rank, Committed()) for rank in self._legs]
        return [*confirmations, *self._release(), Ended(self.ref, commit=first)]

    def _fail(self, failure: Failure, detail: str = "", silent: int = -1) -> list[Effect]:
        if not self.is_live:
            return []
        self.state = ReceivingState.DRAINING
        self._ended = Ended(self.ref, failure, detail)
        told = [Reply(r, Fail(failure, detail)) for r in self.open_ranks if r != silent]
        return [*told, *self._release(), *self._maybe_end()]

    def _release(self) -> list[Effect]:
        """Give back what will not be filled, and its places."""
        places = tuple(binding.place for binding in self._bound.values())
        slots = (*(b.slot for b in self._bound.values()), *self._unplaced.values())
        self._bound.clear()
        self._unplaced.clear()
        self.num_ready = 0
        effects: list[Effect] = [Vacate(places)] if places else []
        return [*effects, Released(self.ref, slots)] if slots else effects


def _runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as (first, count) of consecutive ones, ascending."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
