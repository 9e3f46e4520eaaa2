"""The receiving direction of an endpoint: its transfers. Their frames come over `receiving_link`s.

A frame of a transfer is looked up by all three parts of its reference before anything else is done
with it. What is not found is fenced: thrown away unread, counted, and its sender told.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.proto import transfer_pb2
from quire.transfer.flows import SUCCESS
from quire.transfer.frames import Entry, FrameError, Header, Kind, header_of
from quire.transfer.layout import Shard, Span, pieces, share, sources_of
from quire.transfer.receiving import ReceivingTransfer
from quire.transfer.state import (
    Commit,
    Committed,
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
    TransferRef,
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


class Receiver:
    """See the module. Every event goes to `emit`."""

    def __init__(self, node: Node, emit: Callable[[Event], None]) -> None:
        self._node = node
        self._emit = emit
        self._incoming: dict[TransferRef, Incoming] = {}
        self._committed: OrderedDict[TransferRef, None] = OrderedDict()
        self._early: deque[tuple[ReceivingLink, Header]] = deque(maxlen=MAX_EARLY)

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

    def _is_early(self, ref: TransferRef) -> bool:
        return any(header.ref == ref for _, header in self._early)

    def admit_early(self, ref: TransferRef) -> None:
        """A transfer is expected from now on: senders that were there before it open it."""
        for link, header in list(self._early):
            if header.ref == ref:
                self._early.remove((link, header))
                self.on_frame(link, header, b"")

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
        self._do(incoming, effects)

    def cancel(self, ref: TransferRef) -> None:
        """Give up."""
        if (incoming := self._incoming.get(ref)) is not None:
            self._do(incoming, incoming.machine.cancel())

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
            if keep and not machine.is_over:
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
        if incoming is None:
            self._on_unknown(link, header)
            return
        machine, rank = incoming.machine, link.peer_shard.rank
        if header.kind == Kind.OPEN:
            if incoming.is_learning:
                incoming.is_learning = False
                incoming.legs = self._legs_from(link.peer_shard.degree)
                machine.sent_by(_counts(incoming.legs))
            incoming.links[rank] = link
            incoming.source = (link.peer.worker, link.transport)
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
        self._do(incoming, effects)
        messages = [effect.message for effect in effects if isinstance(effect, Reply)]
        return [Entry(m.block, m.piece) for m in messages if isinstance(m, Resend)]

    def lost(self, link: ReceivingLink) -> None:
        """A link ended."""
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
            self._early.append((link, header))
        elif header.kind == Kind.KEEP and self._is_early(ref):
            link.post(header_of(Kind.KEEP, ref))
        elif header.kind != Kind.FAIL:
            self.fence(link, header)

    def _do(self, incoming: Incoming, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Reply):
                link = incoming.links.get(effect.rank)
                if link is not None:
                    _say(link, incoming.machine.ref, effect.message)
                continue
            if isinstance(effect, Ended):
                self._end(incoming, effect)
            self._emit(effect)

    def _end(self, incoming: Incoming, ended: Ended) -> None:
        ref = incoming.machine.ref
        del self._incoming[ref]
        flow = self._node.counters.flows.of("received", *incoming.source)
        flow.outcomes[ended.failure or SUCCESS] += 1
        if ended.commit is not None:
            flow.blocks += ended.commit.blocks
            self._committed[ref] = None
            if len(self._committed) > REMEMBERED:
                self._committed.popitem(last=False)


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
