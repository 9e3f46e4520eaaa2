"""The receiving direction of an endpoint: its transfers. Their frames come over `receiving_link`s.

A frame of a transfer is looked up by all three parts of its reference before anything else is done
with it. What is not found is fenced: thrown away unread, counted, and its sender told.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from quire.proto import transfer_pb2
from quire.transfer.flows import SUCCESS
from quire.transfer.frames import Entry, FrameError, Header, Kind, header_of
from quire.transfer.layout import Shard, Span, pieces, share, sources_of
from quire.transfer.receiving import ReceivingTransfer
from quire.transfer.state import (
    Commit,
    Committed,
    Delivered,
    Effect,
    Ended,
    Fail,
    Failure,
    FailureCode,
    Grant,
    Lease,
    Message,
    Released,
    Reply,
    Resend,
    Store,
    TransferRef,
    Vacate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from quire.transfer.base import Node
    from quire.transfer.receiving_link import ReceivingLink
    from quire.transfer.state import Event

logger = logging.getLogger(__name__)

MAX_EARLY = 256
"""Senders kept waiting for a reference that is not known here yet."""
REMEMBERED = 4096
"""Committed transfers kept in mind, to confirm a repeated COMMIT."""


@dataclass
class Incoming:
    """A transfer with what connects it to links."""

    machine: ReceivingTransfer
    legs: dict[int, tuple[Span, ...]]
    """Source rank -> pieces that it sends of each block."""
    links: dict[int, ReceivingLink] = field(default_factory=dict)
    source: tuple[str, str] = ("", "")
    """Peer and transport, once a sender has shown up."""
    is_learning: bool = False
    """How many ranks send is not known before the first of them opens."""
    fences: list[Callable[[], None]] = field(default_factory=list)
    """Called when nothing writes into its blocks any more."""


class Receiver:
    """See the module. Every event goes to `emit`."""

    def __init__(self, node: Node, emit: Callable[[Event], None]) -> None:
        self._node = node
        self._emit = emit
        self._incoming: dict[TransferRef, Incoming] = {}
        self._crowded: dict[TransferRef, Incoming] = {}
        """Those with blocks that are ready and wait for a place, the first to get one first."""
        self._committed: OrderedDict[TransferRef, None] = OrderedDict()
        self._early: OrderedDict[tuple[ReceivingLink, TransferRef], Header] = OrderedDict()
        """OPENs of references that are not known here yet, of senders that are still there."""

    def __len__(self) -> int:
        return len(self._incoming)

    # ---- the caller

    def promise(
        self, ref: TransferRef, num_blocks: int, degree: int | None, lease_s: float
    ) -> None:
        """Expect a transfer from a group of `degree` ranks, None for as many as turn out to send.
        Any thread: a single assignment.

        Raises ValueError on a degree that the heads cannot be split over.
        """
        if degree is not None and degree < 1:
            raise ValueError("a transfer has at least one block and one sender")
        legs = self._legs_from(degree or 1)
        lease = Lease(lease_s, self._node.clock())
        machine = ReceivingTransfer(ref, num_blocks, _counts(legs), lease)
        self._incoming[ref] = Incoming(machine, legs, is_learning=degree is None)

    def admit_early(self, ref: TransferRef) -> None:
        """A transfer is expected from now on: senders that were there before it open it."""
        for link, early in list(self._early):
            if early == ref:
                self.on_frame(link, self._early.pop((link, ref)), b"")

    def _legs_from(self, degree: int) -> dict[int, tuple[Span, ...]]:
        """Source rank -> pieces that it sends of each block."""
        layout, mine = self._node.identity.layout, self._node.identity.shard
        legs = {}
        for rank in sources_of(layout, degree, mine):
            span = share(layout, Shard(rank, degree), mine)
            assert span is not None
            legs[rank] = pieces(span)
        return legs

    def grant(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """Bind blocks; they come straight back when the transfer is over."""
        incoming = self._incoming.get(ref)
        if incoming is None:
            self._emit(Released(ref, tuple(slots)))
            return
        try:
            if slots and not 0 <= min(slots) <= max(slots) < self._node.memory.num_blocks:
                raise ValueError(f"blocks {slots} are not all in the pool")
            effects = incoming.machine.grant(first, slots)
        except ValueError as error:
            logger.error("KV transfer %x: %s", ref.transfer, error)
            self._emit(Released(ref, tuple(slots)))
            effects = incoming.machine.refused(Failure.PROTOCOL, str(error))
        self._crowded[ref] = incoming
        self._do(incoming, effects)

    def cancel(self, ref: TransferRef) -> None:
        """Give up."""
        if (incoming := self._incoming.get(ref)) is not None:
            self._do(incoming, incoming.machine.cancel())

    def stop(self, ref: TransferRef, done: Callable[[], None]) -> None:
        """Give up; `done` once nothing writes into granted blocks any more."""
        self.cancel(ref)
        if (incoming := self._incoming.get(ref)) is not None:
            incoming.fences.append(done)
        else:
            done()

    def renew(self, ref: TransferRef) -> None:
        """The caller heard of the transfer by other means, such as its request's stream."""
        if (incoming := self._incoming.get(ref)) is not None:
            incoming.machine.heard(self._node.clock())

    def tick(self, now: float, *, keep: bool) -> None:
        """Let leases expire; with `keep`, tell the senders that this side still holds.

        The grants are repeated with it: should one be lost, both sides would wait for the other,
        each kept alive by the other's word.
        """
        for incoming in list(self._incoming.values()):
            machine = incoming.machine
            self._do(incoming, machine.expire(now))
            if keep and machine.is_live:
                for link in incoming.links.values():
                    link.post(header_of(Kind.KEEP, machine.ref))
                    for grant in machine.grants():
                        _say(link, machine.ref, grant)

    # ---- links

    def find(self, header: Header) -> Incoming | None:
        """The transfer that a frame is of; None when it must be fenced."""
        return self._incoming.get(header.ref)

    def on_frame(self, link: ReceivingLink, header: Header, body: bytes) -> None:
        """OPEN, COMMIT, FAIL or KEEP."""
        incoming, now = self.find(header), self._node.clock()
        if incoming is None or not incoming.machine.is_live:
            self._on_unknown(link, header)
            return
        if (early := self._early.pop((link, header.ref), None)) is not None:
            # `promise` has been called, on another thread, and `admit_early` is yet to run here
            self.on_frame(link, early, b"")
        machine, rank = incoming.machine, link.peer_shard.rank
        if header.kind == Kind.OPEN:
            if incoming.is_learning:
                incoming.is_learning = False
                incoming.legs = self._legs_from(link.peer_shard.degree)
                machine.sent_by(_counts(incoming.legs))
            incoming.links[rank] = link
            incoming.source = (link.peer.worker, link.transport)
            # of one that does not tell it may be that it has everything
            offered = header.num if link.peer.tells_offers else machine.num_blocks
            self._offered(incoming, rank, offered)
            self._do(incoming, machine.opened(rank, now))
        elif incoming.links.get(rank) is not link:
            self.fence(link, header)
        elif header.kind == Kind.COMMIT:
            message = transfer_pb2.KvCommit.FromString(body)
            self._node.counters.flows.note_rate(link.peer.worker, message.bytes_per_s)
            self._do(incoming, machine.commit(rank, _read_commit(message), now))
        elif header.kind == Kind.FAIL:
            self._do(incoming, machine.refused(*read_refusal(body)))
        elif header.kind == Kind.KEEP:
            machine.heard(now)
            self._offered(incoming, rank, header.num)
        else:
            raise FrameError(f"frame kind {header.kind} does not come from a sender")

    def fence(self, link: ReceivingLink, header: Header) -> None:
        """Count a frame that must have no effect, and tell its sender."""
        self._node.counters.fenced_frames += 1
        link.post(header_of(Kind.FENCED, header.ref, sequence=header.sequence))

    def landed(
        self, incoming: Incoming, link: ReceivingLink, pieces: Iterable[tuple[Entry, bool]]
    ) -> list[Entry]:
        """Pieces were written into their places, and which are good; those to be sent again."""
        rank, now = link.peer_shard.rank, self._node.clock()
        parts, effects = incoming.legs[rank], []
        for entry, good in pieces:
            if good:
                link.flow.num_bytes += parts[entry.piece].length
            else:
                link.flow.damaged_pieces += 1
            effects += incoming.machine.landed(rank, entry, good, now)
        messages = [effect.message for effect in effects if isinstance(effect, Reply)]
        self._do(incoming, effects)
        return [Entry(m.block, m.piece) for m in messages if isinstance(m, Resend)]

    def lost(self, link: ReceivingLink) -> None:
        """A link ended."""
        for early in [early for early in self._early if early[0] is link]:
            del self._early[early]  # admitted, it would take the place of the rank's next link
        for incoming in list(self._incoming.values()):
            for rank, other in list(incoming.links.items()):
                if other is link:
                    del incoming.links[rank]
                    self._do(incoming, incoming.machine.lost(rank))

    # ----

    def _on_unknown(self, link: ReceivingLink, header: Header) -> None:
        ref = header.ref
        if header.kind == Kind.COMMIT and ref in self._committed:
            link.post(header_of(Kind.COMMITTED, ref))
        elif header.kind == Kind.OPEN and self._node.identity.shard.rank:
            # Rank 0 made the reference: its word may take longer to get here than the sender's.
            self._early[link, ref] = header
            if len(self._early) > MAX_EARLY:
                self._early.popitem(last=False)
        elif header.kind == Kind.KEEP and (link, ref) in self._early:
            self._early[link, ref] = self._early[link, ref]._replace(num=header.num)
            link.post(header_of(Kind.KEEP, ref))
        elif header.kind == Kind.FAIL:
            self._early.pop((link, ref), None)
        else:
            self.fence(link, header)

    def _do(self, incoming: Incoming, effects: list[Effect]) -> None:
        """Carry out what the machine asks for, and what that makes room for."""
        self._carry_out(incoming, effects)
        self._find_places()

    def _offered(self, incoming: Incoming, rank: int, count: int) -> None:
        incoming.machine.offered(rank, count)
        self._crowded[incoming.machine.ref] = incoming
        self._find_places()

    def _carry_out(self, incoming: Incoming, effects: list[Effect]) -> None:
        memory = self._node.memory
        for effect in effects:
            match effect:  # the most frequent first
                case Delivered() | Released():
                    self._emit(effect)
                case Store(block, slot, place):
                    memory.store(slot, place, partial(self._stored, incoming, block))
                case Reply(rank, message):
                    if (link := incoming.links.get(rank)) is not None:
                        _say(link, incoming.machine.ref, message)
                case Vacate(places):
                    memory.vacate(places)
                case Ended():
                    self._end(incoming, effect)

    def _stored(self, incoming: Incoming, block: int, error: Exception | None) -> None:
        problem = "" if error is None else str(error) or type(error).__name__
        self._do(incoming, incoming.machine.stored(block, problem))

    def _find_places(self) -> None:
        """Granted blocks get places to land at, as far as there is room."""
        while self._crowded:
            ref, incoming = next(iter(self._crowded.items()))
            machine = incoming.machine
            places = self._node.memory.claim_to_land(machine.unplaced, machine.num_ready)
            if len(places) >= machine.num_ready:
                del self._crowded[ref]  # until more is granted or ready
            elif not places:
                return
            self._carry_out(incoming, machine.placed(places))

    def _end(self, incoming: Incoming, ended: Ended) -> None:
        ref = incoming.machine.ref
        del self._incoming[ref]
        self._crowded.pop(ref, None)
        flow = self._node.counters.flows.of("received", *incoming.source)
        flow.outcomes[ended.failure or SUCCESS] += 1
        if ended.commit is not None:
            flow.blocks += ended.commit.blocks
            self._committed[ref] = None
            if len(self._committed) > REMEMBERED:
                self._committed.popitem(last=False)
        self._emit(ended)
        for done in incoming.fences:
            done()


def _counts(legs: dict[int, tuple[Span, ...]]) -> dict[int, int]:
    return {rank: len(parts) for rank, parts in legs.items()}


def _say(link: ReceivingLink, ref: TransferRef, message: Message) -> None:
    match message:
        case Grant(first, count):
            link.post(header_of(Kind.GRANT, ref, first=first, num=count))
        case Committed():
            link.post(header_of(Kind.COMMITTED, ref))
        case Fail(failure, detail):
            link.post(header_of(Kind.FAIL, ref), write_refusal(failure, detail))
        case _:
            pass  # Resend goes out with the frame's ACK


def write_refusal(failure: Failure, detail: str) -> bytes:
    """A failure for the other side."""
    code = FailureCode.__members__.get(failure.name, FailureCode.CANCELLED)
    return transfer_pb2.KvRefusal(code=code, detail=detail).SerializeToString()


def read_refusal(body: bytes) -> tuple[Failure, str]:
    """The other side's failure as this side's: its cancel is not ours."""
    message = transfer_pb2.KvRefusal.FromString(body)
    names = {code.value: code.name for code in FailureCode}
    name = names.get(message.code, "CANCELLED")
    return (Failure.PEER_CANCELLED if name == "CANCELLED" else Failure[name]), message.detail


def _read_commit(message: transfer_pb2.KvCommit) -> Commit:
    return Commit(message.blocks, message.tokens, message.meta, message.digest)
