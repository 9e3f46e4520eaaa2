"""Sending side of one transfer, as a pure state machine.

Life: the caller opens it as soon as the prefill job is accepted, offers blocks as each chunk is
computed, commits; each block is released when the receiver has verified it.

    OPENING     OPEN is sent; nothing is granted yet. Offered blocks wait
    SENDING     blocks both offered and granted get a place, are loaded there and go out
    COMMITTING  the caller committed; once every piece is acknowledged, COMMIT goes out
    DRAINING    over for the peer; some blocks are still being loaded, or read by a transport
    DONE        the receiver confirmed
    FAILED      over

    input \\ state  OPENING      SENDING          COMMITTING              DRAINING      DONE, FAILED
    offer          hold         hold             error                   release       release
    granted        -> SENDING   wait for places  wait for places         -             -
    placed         -            Load             Load                    -             -
    loaded         -            more to take     more to take            last: ->      -
    take           nothing      pieces to write  pieces to write         nothing       nothing
    written        -            no longer read   no longer read          last: ->      -
    acked          -            block: Released  last one: COMMIT        -             -
    damaged        -            send once more   send once more          -             -
    commit         -> COMMITTING -> COMMITTING   error                   -             -
    confirmed      -            -> FAILED        -> DONE                 -             -
    peer fails,    -> DRAINING if a block is loaded or read, else        -             -
    fenced, lost,  -> FAILED
    cancel, lease

The lease is renewed by the receiver's signs of life while this side waits for its caller or for
grants; while pieces or a commit are unanswered, by progress only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from quire.transfer.frames import Entry, digest
from quire.transfer.receiving import MAX_ATTEMPTS
from quire.transfer.state import (
    Commit,
    Committing,
    Effect,
    Ended,
    Fail,
    Failure,
    Lease,
    Load,
    Offered,
    Open,
    Released,
    Reply,
    TransferRef,
    Vacate,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

PEER = -1


class SendingState(StrEnum):
    """See the module's table."""

    OPENING = "opening"
    SENDING = "sending"
    COMMITTING = "committing"
    DRAINING = "draining"
    DONE = "done"
    FAILED = "failed"


_LIVE = (SendingState.OPENING, SendingState.SENDING, SendingState.COMMITTING)

Piece = tuple[int, int]
"""(block, piece)."""


class SendingTransfer:
    """See the module. `piece_bytes`: length of each piece of a block that this receiver gets."""

    def __init__(self, ref: TransferRef, piece_bytes: Sequence[int], lease: Lease) -> None:
        self.ref = ref
        self.lease = lease
        self.state = SendingState.OPENING
        self._piece_bytes = tuple(piece_bytes)
        self._slots: dict[int, int] = {}  # offered, not released
        self.num_offered = 0
        """Leading blocks of the transfer that are computed."""
        self._offered: set[int] = set()
        self._granted: set[int] = set()
        self._unplaced: dict[int, int] = {}  # block -> slot, may be sent and has no place
        self._places: dict[int, int] = {}
        self._loading: set[int] = set()  # blocks being read into their places
        self._unacked: dict[int, set[int]] = {}  # block -> pieces not acknowledged
        self._queue: deque[Piece] = deque()
        self._reading: dict[int, int] = {}  # block -> pieces that the transport may still read
        self._sums: dict[Piece, int] = {}
        self._damaged: dict[Piece, int] = {}  # how often
        self._commit: Commit | None = None
        self._committing = False  # COMMIT is on its way
        self._ended = Ended(ref)

    @property
    def is_live(self) -> bool:
        """The peer has a part in it."""
        return self.state in _LIVE

    @property
    def is_over(self) -> bool:
        """Nothing is held and nothing will be said any more."""
        return self.state in (SendingState.DONE, SendingState.FAILED)

    @property
    def has_pieces(self) -> bool:
        """`take` would give something."""
        return bool(self._queue)

    @property
    def unplaced(self) -> Collection[int]:
        """Blocks of the pool that may be sent and wait for a place, in order."""
        return self._unplaced.values()

    # ---- the caller

    def begin(self) -> list[Effect]:
        """What opens the leg."""
        return [Reply(PEER, Open(self.num_offered))]

    def offer(self, first: int, slots: Iterable[int]) -> list[Effect]:
        """Blocks [first, ...) of the transfer are computed, in these blocks of the pool.

        They are read until released. Raises ValueError when one is offered twice or after commit.
        """
        slots = tuple(slots)
        if not self.is_live:
            return [Released(self.ref, slots)] if slots else []
        blocks = range(first, first + len(slots))
        if self._commit is not None or not self._offered.isdisjoint(blocks):
            raise ValueError(f"blocks {blocks} are offered twice or after the commit")
        self._offered.update(blocks)
        for block, slot in zip(blocks, slots, strict=True):
            self._slots[block] = slot
            if block in self._granted:
                self._unplaced[block] = slot
        while self.num_offered in self._offered:
            self.num_offered += 1
        return [Reply(PEER, Offered(self.num_offered))]

    def commit(self, commit: Commit, now: float) -> list[Effect]:
        """Everything is offered. Raises ValueError when offered and committed blocks differ."""
        if not self.is_live:
            return []
        if self._commit is not None or self._offered != set(range(commit.blocks)):
            raise ValueError(f"commit of {commit.blocks} blocks, offered {len(self._offered)}")
        self._commit = commit
        self.state = SendingState.COMMITTING
        return self._maybe_commit(now)

    def cancel(self) -> list[Effect]:
        """The caller gives up."""
        return self._fail(Failure.CANCELLED)

    # ---- this side's memory

    def placed(self, places: Sequence[int]) -> list[Effect]:
        """The first of `unplaced` have these places."""
        if not places:
            return []
        blocks = tuple(islice(self._unplaced, len(places)))
        slots = tuple(self._unplaced.pop(block) for block in blocks)
        self._places.update(zip(blocks, places, strict=True))
        self._loading.update(blocks)
        return [Load(blocks, slots, tuple(places))]

    def loaded(self, blocks: Iterable[int], error: str = "") -> list[Effect]:
        """Blocks are at their places, or why they are not."""
        self._loading.difference_update(blocks)
        if not self.is_live:
            return self._settle()
        if error:
            return self._fail(Failure.MEMORY, error)
        for block in blocks:
            self._unacked[block] = set(self._all)
            self._queue.extend((block, piece) for piece in self._all)
        return []

    # ---- the peer

    def granted(self, first: int, count: int, now: float) -> list[Effect]:
        """Blocks that may be sent; repeated grants change nothing."""
        if not self.is_live:
            return []
        if self.state is SendingState.OPENING:
            self.state = SendingState.SENDING
        new = [block for block in range(first, first + count) if block not in self._granted]
        if new:
            self.lease.renew(now)
        self._granted.update(new)
        self._unplaced.update((block, self._slots[block]) for block in new if block in self._slots)
        return []

    def heard(self, now: float) -> None:
        """The receiver said that it still holds its side."""
        if not self._unacked and not self._committing:
            self.lease.renew(now)

    def acked(self, pieces: Iterable[Piece], now: float) -> list[Effect]:
        """The receiver verified pieces."""
        if not self.is_live:
            return []
        acknowledged, has_moved = [], False
        for block, piece in pieces:
            missing = self._unacked.get(block)
            if missing is None or piece not in missing:
                continue
            missing.discard(piece)
            has_moved = True
            if not missing:
                del self._unacked[block]
                acknowledged.append(block)
        if has_moved:
            self.lease.renew(now)
        return [*self._release(acknowledged), *self._maybe_commit(now)]

    def damaged(self, pieces: Iterable[Piece]) -> list[Effect]:
        """The receiver wants pieces again."""
        if not self.is_live:
            return []
        for piece in pieces:
            if piece[1] not in self._unacked.get(piece[0], ()):
                continue
            self._damaged[piece] = self._damaged.get(piece, 0) + 1
            if self._damaged[piece] >= MAX_ATTEMPTS:
                return self._fail(Failure.CHECKSUM, f"block {piece[0]} arrived damaged twice")
            self._queue.append(piece)
        return []

    def confirmed(self) -> list[Effect]:
        """The receiver keeps everything."""
        if not self.is_live:
            return []
        if not self._committing:
            return self._fail(Failure.PROTOCOL, "confirmed before the commit")
        self._ended = Ended(self.ref, commit=self._commit)
        return self._finish()

    def refused(self, failure: Failure, detail: str = "") -> list[Effect]:
        """The receiver gave up, or there is none."""
        return self._fail(failure, detail, told=True)

    def lost(self) -> list[Effect]:
        """The connection is closed; it reads no block any more."""
        effects = self._fail(Failure.LOST, "the connection ended", told=True)
        self._reading.clear()
        return [*effects, *self._settle()]

    def expire(self, now: float) -> list[Effect]:
        """Fail when nothing was heard, or nothing moved, for the lease."""
        if not self.is_live or not self.lease.expired(now):
            return []
        return self._fail(Failure.LEASE, f"no progress for {self.lease.length_s:g} s")

    # ---- the transport

    def take(self, max_bytes: int, max_pieces: int) -> list[tuple[Piece, int]]:
        """Pieces to write, with the place of each one's block.

        At least one when there is one; beyond it no more than the limits.
        """
        taken: list[tuple[Piece, int]] = []
        left = max_bytes
        while self._queue and len(taken) < max_pieces:
            piece = self._queue[0]
            left -= self._piece_bytes[piece[1]]
            if left < 0 and taken:
                break
            self._queue.popleft()
            self._reading[piece[0]] = self._reading.get(piece[0], 0) + 1
            taken.append((piece, self._places[piece[0]]))
        return taken

    def summed(self, sums: Iterable[tuple[Piece, int]]) -> None:
        """Checksums of pieces that are being written."""
        self._sums.update(sums)

    def written(self, pieces: Iterable[Piece], now: float) -> list[Effect]:
        """The transport no longer reads these."""
        for block, _ in pieces:
            self._stop_reading(block)
        if self.state is SendingState.DRAINING:
            return self._settle()
        acknowledged = [b for b in {block for block, _ in pieces} if b not in self._unacked]
        return [*self._release(acknowledged), *self._maybe_commit(now)]

    # ----

    def _stop_reading(self, block: int) -> None:
        left = self._reading.get(block, 0) - 1
        if left > 0:
            self._reading[block] = left
        else:
            self._reading.pop(block, None)

    def _is_read(self, block: int) -> bool:
        """At its place, or on its way there."""
        return block in self._loading or block in self._reading

    def _release(self, blocks: Iterable[int]) -> list[Effect]:
        """Give back those that are held and that nothing reads any more, and their places."""
        free = [block for block in blocks if block in self._slots and not self._is_read(block)]
        if not free:
            return []
        slots = tuple(self._slots.pop(block) for block in free)
        places = tuple(self._places.pop(block) for block in free if block in self._places)
        vacated: list[Effect] = [Vacate(places)] if places else []
        return [*vacated, Released(self.ref, slots)]

    @property
    def _all(self) -> range:
        return range(len(self._piece_bytes))

    def _maybe_commit(self, now: float) -> list[Effect]:
        """COMMIT once every block is acknowledged and released."""
        if self._commit is None or self._slots or self._committing or not self.is_live:
            return []
        self._committing = True
        self.lease.renew(now)
        entries = [Entry(*piece, value) for piece, value in self._sums.items()]
        self._commit = replace(self._commit, digest=digest(entries))
        return [Reply(PEER, Committing(self._commit))]

    def _fail(self, failure: Failure, detail: str = "", *, told: bool = False) -> list[Effect]:
        if not self.is_live:
            return []
        self._ended = Ended(self.ref, failure, detail)
        say: list[Effect] = [] if told else [Reply(PEER, Fail(failure, detail))]
        return [*say, *self._finish()]

    def _finish(self) -> list[Effect]:
        self.state = SendingState.DRAINING
        self._queue.clear()
        self._unplaced.clear()
        return self._settle()

    def _settle(self) -> list[Effect]:
        """Release what is not read; end when nothing is."""
        if self.state is not SendingState.DRAINING:
            return []
        effects = self._release(list(self._slots))
        if self._slots or self._reading:
            return effects
        self.state = SendingState.FAILED if self._ended.failure else SendingState.DONE
        return [*effects, self._ended]
