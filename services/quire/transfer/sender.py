"""The sending direction of an endpoint: its transfers. Their frames go over `sending_link`s."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quire.proto import transfer_pb2
from quire.transfer.flows import SUCCESS
from quire.transfer.frames import FrameError, Header, Kind, header_of
from quire.transfer.layout import Span, pieces
from quire.transfer.receiver import read_refusal, write_refusal
from quire.transfer.sending import SendingTransfer
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
    from collections.abc import Callable, Sequence

    from quire.transfer.base import Node
    from quire.transfer.sending_link import SendingLink
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
        self.helper = ThreadPoolExecutor(1, "kv-checksums")
        """Its thread begins with the first frame that is taken ahead."""
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
