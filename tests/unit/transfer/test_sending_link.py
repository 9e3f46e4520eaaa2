"""Frames that a sending link takes ahead of their turn, to have their checksums ready."""

import asyncio

import numpy as np
import pytest
from transfers import LAYOUT, Quiet, config

from quire.transfer.base import Node
from quire.transfer.frames import Kind, checksum, header_of, unpack, unpack_entries
from quire.transfer.layout import Shard, Span, block_bytes
from quire.transfer.link import LinkState
from quire.transfer.memory import HostMemory
from quire.transfer.negotiate import Identity
from quire.transfer.sender import Sender
from quire.transfer.sending_link import SendingLink
from quire.transfer.state import Commit, Ended, Failure, Released, TransferRef

SIZE = block_bytes(LAYOUT, Shard())
REF = TransferRef(7, 1, 5)


class Side:
    """A sender of blocks 0 to 4, all granted, over one link."""

    def __init__(self):
        self.pool = np.random.default_rng(0).integers(0, 256, (8, SIZE), np.uint8)
        self.events = []
        identity = Identity(LAYOUT, Shard(), "p", 4, 1.0)
        node = Node(identity, config(), HostMemory(self.pool, SIZE), lambda: 0.0)
        self.sender = Sender(node, self.events.append)
        self.link = SendingLink(Quiet(2 * SIZE), "tcp", node, self.sender)
        self.link.state = LinkState.READY
        self.sender.begin(REF, Span(0, 0, SIZE), 5.0, "d")
        self.sender.connect(REF, self.link)
        self.sender.offer(REF, 0, range(5))
        self.link.on_transfer_frame(header_of(Kind.GRANT, REF, num=5), b"")

    def returned(self):
        return sorted(s for e in self.events if isinstance(e, Released) for s in e.slots)

    def ended(self):
        return [event.failure for event in self.events if isinstance(event, Ended)]


@pytest.fixture
def side():
    async def make():
        return Side()

    side = asyncio.run(make())
    yield side
    side.sender.helper.shutdown()


def test_every_frame_has_the_checksums_of_its_own_blocks(side):
    blocks = []
    while (frame := side.link.next_data()) is not None:
        header, table = unpack(frame.head[:64]), unpack_entries(frame.head[64:])
        assert [entry.checksum for entry in table] == [checksum(part) for part in frame.parts]
        assert header.length == len(frame.head) - 64 + sum(map(len, frame.parts))
        blocks += [entry.block for entry in table]
        frame.written()
        side.link.on_transfer_frame(header_of(Kind.ACK, REF, sequence=header.sequence), b"")
    assert blocks == [0, 1, 2, 3, 4]
    assert side.returned() == [0, 1, 2, 3, 4]
    side.sender.commit(REF, Commit(5, 80))
    side.link.on_transfer_frame(header_of(Kind.COMMITTED, REF), b"")
    assert side.ended() == [None]


def test_a_frame_taken_ahead_of_the_end_is_not_sent_and_its_blocks_come_back(side):
    frame = side.link.next_data()
    side.sender.cancel(REF)
    assert side.returned() == [4] and not side.ended()  # two frames are still being read
    frame.written()
    assert side.returned() == [0, 1, 4] and not side.ended()
    assert side.link.next_data() is None
    assert side.returned() == [0, 1, 2, 3, 4]
    assert side.ended() == [Failure.CANCELLED]


def test_a_lost_link_gives_back_what_was_taken_ahead(side):
    frame = side.link.next_data()
    side.link.close("test")
    assert side.returned() == [0, 1, 2, 3, 4]
    assert side.ended() == [Failure.LOST]
    frame.written()
    assert side.ended() == [Failure.LOST]
