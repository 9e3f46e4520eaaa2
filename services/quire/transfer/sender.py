"""The sending direction of an endpoint: its transfers, and the links that it dialled.

Transfers on one link take turns, frame by frame; at most a window of bytes is unacknowledged, so
that control never waits behind more than that.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from quire.proto import transfer_pb2
from quire.transfer.flows import SUCCESS
from quire.transfer.frames import (
    MAX_ENTRIES,
    Entry,
    FrameError,
    Header,
    Kind,
    checksum,
    header_of,
    pack,
    pack_entries,
    unpack_entries,
)
from quire.transfer.layout import Span, pieces
from quire.transfer.link import DialledLink, Outgoing
from quire.transfer.receiver import read_refusal, write_refusal
from quire.transfer.sending import Piece, SendingTransfer
from quire.transfer.state import (
    Commit,
    Committing,
    Effect,
    Ended,
    Fail,
    Failure,
    Lease,
    Load,
    Message,
    Offered,
    Open,
    Released,
    Reply,
    TransferRef,
    Vacate,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from quire.transfer.base import Channel, Node
    from quire.transfer.flows import Flow
    from quire.transfer.state import Event

logger = logging.getLogger(__name__)


@dataclass
class Departing:
    """A transfer with what connects it to its link."""

    machine: SendingTransfer
    parts: tuple[Span, ...]
    """Pieces that it sends of each block."""
    peer: str
    link: SendingLink | None = None
    committed_at: float | None = None


class Sender:
    """See the module. Every event goes to `emit`."""

    def __init__(self, node: Node, emit: Callable[[Event], None]) -> None:
        self._node = node
        self._emit = emit
        self._departing: dict[TransferRef, Departing] = {}
        self._crowded: dict[TransferRef, Departing] = {}
        """Those with blocks that wait for a place, the first to get one first."""

    def __len__(self) -> int:
        return len(self._departing)

    # ---- the caller

    def begin(self, ref: TransferRef, span: Span, lease_s: float, peer: str) -> None:
        """A transfer whose link is being made; blocks may be offered already."""
        parts = pieces(span)
        lease = Lease(lease_s, self._node.clock())
        machine = SendingTransfer(ref, [part.length for part in parts], lease)
        self._departing[ref] = Departing(machine, parts, peer)

    def connect(self, ref: TransferRef, link: SendingLink) -> None:
        """The link stands: open the leg."""
        departing = self._departing.get(ref)
        if departing is None:
            # Over before it began: the receiver need not find out by its lease.
            _say(link, ref, Open())
            _say(link, ref, Fail(Failure.CANCELLED))
            return
        departing.link = link
        link.add(departing)
        self.do(departing, departing.machine.begin())

    def offer(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """Blocks are computed; they come straight back when the transfer is over."""
        departing = self._departing.get(ref)
        if departing is None:
            self._emit(Released(ref, tuple(slots)))
            return
        try:
            if slots and not 0 <= min(slots) <= max(slots) < self._node.memory.num_blocks:
                raise ValueError(f"blocks {slots} are not all in the pool")
            self.do(departing, departing.machine.offer(first, slots))
        except ValueError as error:
            self._emit(Released(ref, tuple(slots)))
            self._misused(departing, error)

    def commit(self, ref: TransferRef, commit: Commit) -> None:
        """Every block is offered."""
        if (departing := self._departing.get(ref)) is not None:
            departing.committed_at = now = self._node.clock()
            try:
                self.do(departing, departing.machine.commit(commit, now))
            except ValueError as error:
                self._misused(departing, error)

    def cancel(self, ref: TransferRef) -> None:
        """Give up."""
        if (departing := self._departing.get(ref)) is not None:
            self.do(departing, departing.machine.cancel())

    def refuse(self, ref: TransferRef, failure: Failure, detail: str) -> None:
        """There is no link for it."""
        if (departing := self._departing.get(ref)) is not None:
            self.do(departing, departing.machine.refused(failure, detail))

    def tick(self, now: float, *, keep: bool) -> None:
        """Let leases expire; with `keep`, tell the receivers that this side still holds."""
        for departing in list(self._departing.values()):
            self.do(departing, departing.machine.expire(now))
            if keep and departing.machine.is_live and departing.link is not None:
                _say(departing.link, departing.machine.ref, Offered(departing.machine.num_offered))

    # ---- links

    def on_frame(self, header: Header, body: bytes) -> None:
        """GRANT, COMMITTED, FAIL, FENCED or KEEP."""
        departing = self._departing.get(header.ref)
        if departing is None:
            return  # ended here while the frame was on its way
        machine, now = departing.machine, self._node.clock()
        if header.kind == Kind.GRANT:
            self.do(departing, machine.granted(header.first, header.num, now))
        elif header.kind == Kind.COMMITTED:
            self.do(departing, machine.confirmed())
        elif header.kind == Kind.FAIL:
            self.do(departing, machine.refused(*read_refusal(body)))
        elif header.kind == Kind.FENCED:
            self.do(departing, machine.refused(Failure.FENCED, "the receiver does not know it"))
        elif header.kind == Kind.KEEP:
            machine.heard(now)
        else:
            raise FrameError(f"frame kind {header.kind} does not come from a receiver")

    def do(self, departing: Departing, effects: list[Effect]) -> None:
        """Carry out what the machine asks for, and what that makes room for."""
        self._carry_out(departing, effects)
        if departing.machine.unplaced:
            self._crowded[departing.machine.ref] = departing
        self._find_places()

    def _carry_out(self, departing: Departing, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(_, message):
                    if departing.link is not None:
                        _say(departing.link, departing.machine.ref, message)
                case Load(blocks, slots, places):
                    done = partial(self._loaded, departing, blocks)
                    self._node.memory.load(slots, places, done)
                case Vacate(places):
                    self._node.memory.vacate(places)
                case Ended():
                    self._end(departing, effect)
                    self._emit(effect)
                case Released():
                    self._emit(effect)
        if departing.link is not None:
            departing.link.wake()

    def _find_places(self) -> None:
        """Blocks that may be sent get places, as far as there is room."""
        while self._crowded:
            ref, departing = next(iter(self._crowded.items()))
            waiting = departing.machine.unplaced
            places = self._node.memory.claim_to_send(waiting)
            if len(places) == len(waiting):
                del self._crowded[ref]
            elif not places:
                return
            self._carry_out(departing, departing.machine.placed(places))

    def _loaded(
        self, departing: Departing, blocks: tuple[int, ...], error: Exception | None
    ) -> None:
        problem = "" if error is None else str(error) or type(error).__name__
        self.do(departing, departing.machine.loaded(blocks, problem))

    def _misused(self, departing: Departing, error: ValueError) -> None:
        logger.error("KV transfer %x: %s", departing.machine.ref.transfer, error)
        self.do(departing, departing.machine.cancel())

    def _end(self, departing: Departing, ended: Ended) -> None:
        del self._departing[departing.machine.ref]
        self._crowded.pop(departing.machine.ref, None)
        transport = ""
        if departing.link is not None:
            departing.link.remove(departing)
            transport = departing.link.transport
        flow = self._node.counters.flows.of("sent", departing.peer, transport)
        flow.outcomes[ended.failure or SUCCESS] += 1
        if ended.commit is not None and departing.committed_at is not None:
            flow.blocks += ended.commit.blocks
            flow.exposed_s += self._node.clock() - departing.committed_at


@dataclass
class _Sent:
    """A DATA frame that is not acknowledged."""

    departing: Departing
    pieces: list[Piece] = field(default_factory=list)
    num_bytes: int = 0


class SendingLink(DialledLink):
    """Frames to one receiving rank."""

    def __init__(self, channel: Channel, transport: str, node: Node, sender: Sender) -> None:
        self.sender = sender
        self.probes: dict[int, asyncio.Future[None]] = {}
        """Sequence of a PROBE -> resolved when it arrived."""
        self._departing: deque[Departing] = deque()
        self._sent: dict[int, _Sent] = {}
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
        if self._unacked_bytes >= self.node.config.kv_window_bytes:
            return None
        for _ in range(len(self._departing)):
            departing = self._departing[0]
            self._departing.rotate(-1)
            if departing.machine.has_pieces:
                return self._data(departing)
        return None

    def _data(self, departing: Departing) -> Outgoing:
        machine, memory = departing.machine, self.node.memory
        taken = machine.take(self.frame_bytes, MAX_ENTRIES)
        views, entries = [], []
        for (block, piece), slot in taken:
            part = departing.parts[piece]
            view = memory.view(slot, part.source, part.length)
            views.append(view)
            entries.append(Entry(block, piece, checksum(view)))
        machine.summed(entries)
        sequence, num_bytes = self.next_sequence(), sum(map(len, views))
        names = [piece for piece, _ in taken]
        self._sent[sequence] = _Sent(departing, names, num_bytes)
        if not self._unacked_bytes:
            self._busy_since = self.node.clock()
        self._unacked_bytes += num_bytes
        self.flow.num_bytes += num_bytes
        table = pack_entries(entries)
        header = header_of(
            Kind.DATA,
            machine.ref,
            rank=self.node.identity.shard.rank,
            length=len(table) + num_bytes,
            num=len(entries),
            sequence=sequence,
        )

        def written() -> None:
            self.sender.do(departing, machine.written(names, self.node.clock()))

        return Outgoing(pack(header, table), tuple(views), written)

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
        for departing in list(self._departing):
            self.sender.do(departing, departing.machine.lost())

    def _on_ack(self, header: Header, body: bytes) -> None:
        sent = self._settle(header.sequence)
        if sent is None:
            return  # of a transfer that is over
        self.flow.acknowledged(sent.num_bytes)
        damaged = {(entry.block, entry.piece) for entry in unpack_entries(body)}
        machine = sent.departing.machine
        good = [piece for piece in sent.pieces if piece not in damaged]
        self.flow.damaged_pieces += len(damaged)
        self.sender.do(sent.departing, machine.acked(good, self.node.clock()))
        if damaged:
            self.sender.do(sent.departing, machine.damaged(damaged))

    def _settle(self, sequence: int) -> _Sent | None:
        """The frame is answered: its bytes leave the window."""
        sent = self._sent.pop(sequence, None)
        if sent is not None:
            self._unacked_bytes -= sent.num_bytes
            now = self.node.clock()
            self.flow.busy(now - self._busy_since)
            self._busy_since = now
        return sent


def _say(link: SendingLink, ref: TransferRef, message: Message) -> None:
    match message:
        case Open(count):
            link.post(header_of(Kind.OPEN, ref, num=count))
        case Offered(count):
            link.post(header_of(Kind.KEEP, ref, num=count))
        case Committing(commit):
            body = transfer_pb2.KvCommit(
                blocks=commit.blocks, tokens=commit.tokens, digest=commit.digest, meta=commit.meta,
                bytes_per_s=int(link.flow.bytes_per_s),
            )  # fmt: skip
            link.post(header_of(Kind.COMMIT, ref), body.SerializeToString())
        case Fail(failure, detail):
            link.post(header_of(Kind.FAIL, ref), write_refusal(failure, detail))
        case _:
            raise TypeError(f"a sender does not say {message}")
