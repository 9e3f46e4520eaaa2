"""What a receiving link does with frames that a correct sender does not send."""

import asyncio

import numpy as np
import pytest
from transfers import LAYOUT, Quiet, config

from quire.transfer.base import Node
from quire.transfer.frames import (
    Entry,
    FrameError,
    Header,
    Kind,
    checksum,
    header_of,
    pack,
    pack_entries,
    unpack,
)
from quire.transfer.intake import Intake
from quire.transfer.layout import Shard, block_bytes
from quire.transfer.link import LinkState
from quire.transfer.memory import HostMemory
from quire.transfer.negotiate import Identity
from quire.transfer.receiver import Receiver, write_refusal
from quire.transfer.receiving_link import ReceivingLink
from quire.transfer.state import Delivered, Failure, TransferRef

SIZE = block_bytes(LAYOUT, Shard())
REF = TransferRef(7, 1, 5)


class Side:
    """A receiver with a pool of zeros that was granted blocks 0, 1, 2 at slots 4, 5, 6."""

    def __init__(self):
        self.pool = np.zeros((8, SIZE), np.uint8)
        self.events = []
        identity = Identity(LAYOUT, Shard(), "d", 5, 1.0)
        self.node = Node(identity, config(), HostMemory(self.pool, SIZE), lambda: 0.0)
        self.receiver = Receiver(self.node, self.events.append)
        self.receiver.promise(REF, 3, 1, 5.0)
        self.receiver.grant(REF, 0, [4, 5, 6])

    def link(self):
        """A sender's, on which it has opened the transfer."""
        link = ReceivingLink(Quiet(), "tcp", self.node, self.receiver)
        link.state = LinkState.READY
        intake = Intake(link)
        intake.feed(pack(header_of(Kind.OPEN, REF)))
        return link, intake

    def delivered(self):
        return [event.slot for event in self.events if isinstance(event, Delivered)]


@pytest.fixture
def side():
    async def make():
        return Side()

    return asyncio.run(make())


def data(*blocks, sequence=1):
    payloads = [bytes([block + 1]) * SIZE for block in blocks]
    table = pack_entries([Entry(b, 0, checksum(p)) for b, p in zip(blocks, payloads, strict=True)])
    header = header_of(
        Kind.DATA, REF, num=len(blocks), sequence=sequence, length=len(table) + len(payloads) * SIZE
    )
    return pack(header, table) + b"".join(payloads)


def answers(link):
    return [Header(*unpack(frame.head[:64])).kind for frame in link._control]


def test_a_frame_is_delivered_and_acknowledged(side):
    link, intake = side.link()
    intake.feed(data(0, 2))
    assert side.delivered() == [4, 6]
    assert (side.pool[4] == 1).all() and (side.pool[6] == 3).all() and not side.pool[5].any()
    assert answers(link)[-1] == Kind.ACK


def test_a_piece_twice_in_one_frame_ends_the_connection_before_a_byte_is_copied(side):
    """The second would be written into a block that is the caller's since the first."""
    _, intake = side.link()
    with pytest.raises(FrameError, match="twice"):
        intake.feed(data(0, 1, 0))
    assert not side.pool.any() and not side.delivered()


def test_what_was_delivered_is_not_written_again(side):
    link, intake = side.link()
    intake.feed(data(0))
    side.pool[4] = 99  # the caller's now
    intake.feed(data(0, 1, sequence=2))
    assert (side.pool[4] == 99).all() and (side.pool[5] == 2).all()
    assert side.delivered() == [4, 5]
    assert side.node.counters.duplicate_pieces == 1
    assert answers(link)[-1] == Kind.ACK


def test_a_frame_cut_short_by_another_link_of_its_rank_delivers_nothing(side):
    """Both might write into the same place: only the latest link's pieces count."""
    old, early = side.link()
    frame = data(0, 1)
    early.feed(frame[:-10])  # block 0 is whole and good
    _, late = side.link()
    early.feed(frame[-10:])
    assert side.delivered() == []
    assert not side.pool[5][-10:].any()
    assert answers(old)[-1] == Kind.FENCED
    late.feed(data(0, 1))
    assert side.delivered() == [4, 5]


def test_a_frame_that_the_end_of_its_transfer_cut_short_is_fenced(side):
    link, intake = side.link()
    frame = data(0, 1)
    intake.feed(frame[: -(SIZE + 10)])
    side.receiver.cancel(REF)
    side.pool[4:6] = 0  # someone else's now
    intake.feed(frame[-(SIZE + 10) :])
    assert not side.pool.any() and not side.delivered()
    assert answers(link)[-1] == Kind.FENCED


class Second:
    """A receiver of rank 1: senders may be there before it hears of their transfer."""

    def __init__(self) -> None:
        pool = np.zeros((8, SIZE), np.uint8)
        identity = Identity(LAYOUT, Shard(1, 2), "d", 5, 1.0)
        self.node = Node(identity, config(), HostMemory(pool, SIZE), lambda: 0.0)
        self.receiver = Receiver(self.node, [].append)

    def link(self) -> ReceivingLink:
        """A link whose sender has opened a transfer that nobody promised yet."""
        link = ReceivingLink(Quiet(), "tcp", self.node, self.receiver)
        link.state = LinkState.READY
        self.receiver.on_frame(link, header_of(Kind.OPEN, REF, num=2), b"")
        return link

    def links(self) -> dict[int, ReceivingLink]:
        """Those of the transfer."""
        return self.receiver.find(header_of(Kind.KEEP, REF)).links


def test_a_sender_that_was_early_may_speak_before_it_is_admitted():
    async def run():
        second = Second()
        link, receiver = second.link(), second.receiver
        receiver.promise(REF, 2, 1, 5.0)  # as from another thread: `admit_early` is on its way
        receiver.on_frame(link, header_of(Kind.KEEP, REF, num=2), b"")
        receiver.admit_early(REF)
        assert second.node.counters.fenced_frames == 0
        assert second.links() == {0: link}

    asyncio.run(run())


@pytest.mark.parametrize("leaves", ["lost", "fail"])
def test_a_sender_that_was_early_and_left_is_not_admitted(leaves):
    async def run():
        second = Second()
        link, receiver = second.link(), second.receiver
        if leaves == "lost":
            link.close("the sender died")
        else:
            receiver.on_frame(link, header_of(Kind.FAIL, REF), write_refusal(Failure.CANCELLED, ""))
            receiver.on_frame(link, header_of(Kind.KEEP, REF, num=2), b"")
            assert answers(link) == [Kind.FENCED]  # nothing of it is kept
        receiver.promise(REF, 2, 1, 5.0)
        receiver.admit_early(REF)
        assert second.links() == {}

    asyncio.run(run())


def test_a_lost_link_of_an_early_sender_does_not_replace_its_next_one():
    """The next one opens and speaks after the promise and before the admission."""

    async def run():
        second = Second()
        old, new, receiver = second.link(), second.link(), second.receiver
        old.close("cut")
        receiver.promise(REF, 2, 1, 5.0)
        receiver.on_frame(new, header_of(Kind.KEEP, REF, num=2), b"")
        receiver.admit_early(REF)
        assert second.links() == {0: new}

    asyncio.run(run())


def test_a_sign_of_life_right_behind_the_welcome_is_no_error():
    async def run():
        link, _ = Side().link()
        link.state = LinkState.GREETING
        link.on_frame(Header(Kind.PING), b"")
        with pytest.raises(FrameError, match="before the greeting"):
            link.on_frame(header_of(Kind.KEEP, REF), b"")

    asyncio.run(run())
