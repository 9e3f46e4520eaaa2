"""A worker's end of KV transfer when its model is spread over ranks: an endpoint each, used as one.

    receive    every rank expects its share of each block    Delivered when all ranks have theirs
    send       every rank that holds something for one of    Released when nobody reads it
               the receiving ranks sends it
    Ended      when it has ended on every rank; the first failure ends it on the others

Rank 0 is the `Endpoint` in this process, the others are reached through `Ranks`. The reference of a
transfer differs between receiving ranks in its incarnation alone: rank r has that of rank 0 plus r.
A group of one talks to groups of several in the same way.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from quire.transfer.endpoint import FENCE_TIMEOUT_S, Endpoint
from quire.transfer.layout import Shard, share
from quire.transfer.state import (
    Commit,
    Delivered,
    Ended,
    Event,
    Failure,
    Released,
    TransferRef,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.memory import PoolMemory
    from quire.transfer.negotiate import Identity, Peer

Leg = tuple[int, TransferRef]
"""(rank of this worker, the reference there)."""


class Ranks(Protocol):
    """The endpoints of ranks 1, 2 …, each in its process. Verbs are `Endpoint`'s."""

    def start(
        self, config: TransferConfig, identity: Identity, on_event: Callable[[int, Event], None]
    ) -> tuple[Peer, ...]:
        """Have every rank listen as `identity_of` says. Raises OSError when one cannot."""

    def expect(self, leg: Leg, num_blocks: int, degree: int | None, lease_s: float) -> None:
        """See `Endpoint.expect`."""

    def grant(self, leg: Leg, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.grant`."""

    def renew(self, leg: Leg) -> None:
        """See `Endpoint.renew`."""

    def send(self, leg: Leg, peer: Peer, lease_s: float) -> None:
        """See `Endpoint.send`."""

    def offer(self, leg: Leg, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.offer`."""

    def commit(self, leg: Leg, commit: Commit) -> None:
        """See `Endpoint.commit`."""

    def cancel(self, leg: Leg) -> None:
        """See `Endpoint.cancel`."""

    def fence(self, leg: Leg, timeout_s: float) -> None:
        """See `Endpoint.fence`. Raises TimeoutError."""


def identity_of(identity: Identity, rank: int) -> Identity:
    """What rank `rank` of rank 0's worker says of itself."""
    shard = Shard(rank, identity.shard.degree)
    return replace(identity, shard=shard, incarnation=_nth(identity.incarnation, rank))


def _nth(incarnation: int, rank: int) -> int:
    return (incarnation + rank) % (1 << 64)


def _leg_ref(ref: TransferRef, rank: int) -> TransferRef:
    """The reference of a transfer at a receiving rank."""
    return ref._replace(incarnation=_nth(ref.incarnation, rank))


@dataclass
class _Joined:
    """A transfer over its legs."""

    ref: TransferRef
    live: set[Leg]
    """Not ended."""
    legs: tuple[Leg, ...] = ()
    held: dict[int, set[Leg]] = field(default_factory=dict)
    """Block of the pool -> legs that have yet to give it back."""
    spoiled: set[int] = field(default_factory=set)
    """Blocks that some leg gave back unfilled."""
    ended: Ended | None = None

    @property
    def is_over(self) -> bool:
        """Every leg has ended and every block is back."""
        return not self.live and not self.held

    def hold(self, slots: Iterable[int]) -> None:
        """Blocks go to every leg."""
        for slot in slots:
            self.held[slot] = set(self.legs)

    def take(self, leg: Leg, event: Event) -> list[Event]:
        """What a leg says; what the caller is told."""
        if isinstance(event, Delivered):
            return self._give_back(leg, event.slot, Delivered(self.ref, event.block, event.slot))
        if isinstance(event, Released):
            self.spoiled.update(event.slots)
            return [e for slot in event.slots for e in self._give_back(leg, slot, None)]
        self.live.discard(leg)
        if self.ended is None or (self.ended.failure is None and event.failure is not None):
            self.ended = replace(event, ref=self.ref)
        return [] if self.live else [self.ended]

    def _give_back(self, leg: Leg, slot: int, delivered: Delivered | None) -> list[Event]:
        waiting = self.held.get(slot, set())
        waiting.discard(leg)
        if waiting or self.held.pop(slot, None) is None:
            return []
        if delivered is None or slot in self.spoiled:
            self.spoiled.discard(slot)
            return [Released(self.ref, (slot,))]
        return [delivered]


class GroupEndpoint(Endpoint):
    """See the module. `ranks`: the other ranks of this worker, if there are any."""

    def __init__(
        self,
        config: TransferConfig,
        identity: Identity,
        memory: PoolMemory,
        on_event: Callable[[Event], None],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(config, identity, memory, lambda event: self._hear(0, event))
        self._tell = on_event
        self._ranks = ranks
        self._lock = threading.RLock()
        self._joined: dict[TransferRef, _Joined] = {}
        self._by_leg: dict[Leg, _Joined] = {}

    def start(self) -> Peer:
        """Listen on every rank; returns how others reach them. Raises OSError."""
        own = super().start()
        if self._ranks is None:
            return own
        others = self._ranks.start(self._config, self._identity, self._hear)
        return replace(own, others=others)

    # ---- receiving

    def receive(
        self,
        num_blocks: int,
        *,
        degree: int | None = None,
        after: TransferRef | None = None,
        lease_s: float | None = None,
    ) -> TransferRef:
        """See `Endpoint.receive`."""
        if after is not None:
            self.cancel(after)
        ref = self._new_ref(num_blocks, after)
        legs = [(rank, _leg_ref(ref, rank)) for rank in range(self._identity.shard.degree)]
        self._join(ref, legs)
        for leg in legs:
            if self._ranks is None or leg[0] == 0:
                self.expect(leg[1], num_blocks, degree=degree, lease_s=lease_s)
            else:
                self._ranks.expect(leg, num_blocks, degree, self._lease(lease_s))
        return ref

    def grant(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.grant`."""
        for rank, leg_ref in self._hold(ref, slots):
            if self._ranks is None or rank == 0:
                super().grant(leg_ref, first, slots)
            else:
                self._ranks.grant((rank, leg_ref), first, slots)

    def renew(self, ref: TransferRef) -> None:
        """See `Endpoint.renew`."""
        for rank, leg_ref in self._legs(ref):
            if self._ranks is None or rank == 0:
                super().renew(leg_ref)
            else:
                self._ranks.renew((rank, leg_ref))

    # ---- sending

    def send(self, ref: TransferRef, peer: Peer, *, lease_s: float | None = None) -> None:
        """Begin to send to every rank of a worker, from those here that hold its heads."""
        identity = self._identity
        try:
            legs = {
                (rank, _leg_ref(ref, other.shard.rank)): other
                for other in (peer, *peer.others)
                for rank in range(identity.shard.degree)
                if share(identity.layout, Shard(rank, identity.shard.degree), other.shard)
            }
        except ValueError as error:
            self._tell(Ended(ref, Failure.INCOMPATIBLE, str(error)))
            return
        self._join(ref, legs)
        for leg, other in legs.items():
            if self._ranks is None or leg[0] == 0:
                super().send(leg[1], other, lease_s=lease_s)
            else:
                self._ranks.send(leg, other, self._lease(lease_s))

    def offer(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.offer`."""
        for rank, leg_ref in self._hold(ref, slots):
            if self._ranks is None or rank == 0:
                super().offer(leg_ref, first, slots)
            else:
                self._ranks.offer((rank, leg_ref), first, slots)

    def commit(self, ref: TransferRef, *, blocks: int, tokens: int, meta: bytes = b"") -> None:
        """See `Endpoint.commit`."""
        for rank, leg_ref in self._legs(ref):
            if self._ranks is None or rank == 0:
                super().commit(leg_ref, blocks=blocks, tokens=tokens, meta=meta)
            else:
                self._ranks.commit((rank, leg_ref), Commit(blocks, tokens, meta))

    # ---- both

    def cancel(self, ref: TransferRef) -> None:
        """See `Endpoint.cancel`."""
        for leg in self._legs(ref):
            self._cancel(leg)

    def fence(self, ref: TransferRef, timeout_s: float = FENCE_TIMEOUT_S) -> None:
        """See `Endpoint.fence`: nothing writes on any rank."""
        for rank, leg_ref in self._legs(ref):
            if self._ranks is None or rank == 0:
                super().fence(leg_ref, timeout_s)
            else:
                self._ranks.fence((rank, leg_ref), timeout_s)

    # ----

    def _cancel(self, leg: Leg) -> None:
        if self._ranks is None or leg[0] == 0:
            super().cancel(leg[1])
        else:
            self._ranks.cancel(leg)

    def _join(self, ref: TransferRef, legs: Iterable[Leg]) -> None:
        joined = _Joined(ref, set(legs), tuple(legs))
        with self._lock:
            self._joined[ref] = joined
            self._by_leg.update(dict.fromkeys(joined.legs, joined))

    def _legs(self, ref: TransferRef) -> tuple[Leg, ...]:
        with self._lock:
            joined = self._joined.get(ref)
            return joined.legs if joined is not None else ()

    def _hold(self, ref: TransferRef, slots: Sequence[int]) -> tuple[Leg, ...]:
        """The legs that get these blocks; none, and the blocks come back, when it is over."""
        with self._lock:
            joined = self._joined.get(ref)
            if joined is None or not joined.live:
                if slots:
                    self._tell(Released(ref, tuple(slots)))
                return ()
            joined.hold(slots)
            return joined.legs

    def _hear(self, rank: int, event: Event) -> None:
        """An event of one leg, on the thread of its rank."""
        leg = (rank, event.ref)
        others: tuple[Leg, ...] = ()
        with self._lock:
            joined = self._by_leg.get(leg)
            if joined is None:
                return
            for told in joined.take(leg, event):
                self._tell(told)
            if isinstance(event, Ended) and event.failure is not None:
                others = tuple(joined.live)
            if joined.is_over:
                del self._joined[joined.ref]
                for each in joined.legs:
                    self._by_leg.pop(each, None)
        for other in others:
            self._cancel(other)
