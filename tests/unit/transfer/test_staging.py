"""Blocks of a pool that is not host memory: places are few, waited for, and always come back; the
pool is written into only between the last checksum and `Delivered`."""

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfers import LAYOUT, Net, newer, run
from waiting import wait_until

from quire.proto.transfer_pb2 import Hello
from quire.transfer.frames import Header, Kind
from quire.transfer.layout import Shard
from quire.transfer.receiver import Receiver
from quire.transfer.staging import Lane, Request, StagedMemory
from quire.transfer.state import Ended, Failure


def all_places_back(*sides):
    wait_until(lambda: all(side.places_taken() == (0, 0) for side in sides))


@pytest.fixture
def watched(monkeypatch):
    """The most places that any lane had taken, by its capacity."""
    most = {}
    claim = Lane.claim

    def watch(lane, count):
        claimed = claim(lane, count)
        most[lane] = max(most.get(lane, 0), lane.num_taken)
        return claimed

    monkeypatch.setattr(Lane, "claim", watch)
    return most


@pytest.mark.parametrize(("left", "right"), [("host", "staged"), ("staged", "host")])
def test_host_and_staged_pools_exchange_blocks(left, right):
    net = Net()
    with net.side(1, memory=left) as p, net.side(2, memory=right) as d:
        ref, there, here = run(p, d)
        assert there.failure is here.failure is None
        assert p.returned(ref) == list(range(12))
        assert d.delivered(ref) == {i: 30 + i for i in range(12)}
        assert (d.pool[30:42] == p.pool[:12]).all()
        all_places_back(p if left == "staged" else d)


@pytest.mark.parametrize("places", [2, 3, 64])
def test_staging_is_bounded_and_waited_for(places, watched):
    """Eight transfers both ways at once between two pods with a place or two in each direction."""
    net = Net()
    staged = {"memory": "staged", "staging_places": places, "num_blocks": 96}
    with net.side(1, **staged) as left, net.side(2, **staged) as right:
        refs = []
        for number in range(4):
            for p, d in ((left, right), (right, left)):
                ref = d.endpoint.receive(12)
                d.endpoint.grant(ref, 0, range(48 + 12 * number, 60 + 12 * number))
                p.endpoint.send(ref, d.peer)
                p.endpoint.offer(ref, 0, range(12 * number, 12 * number + 12))
                p.endpoint.commit(ref, blocks=12, tokens=192)
                refs.append((ref, p, d))
        for ref, p, d in refs:
            assert d.ended(ref).failure is p.ended(ref).failure is None
        assert (left.pool[48:] == right.pool[:48]).all()
        assert (right.pool[48:] == left.pool[:48]).all()
        all_places_back(left, right)
        assert max(watched.values()) <= -(-places // 2)


def test_prompts_that_queue_take_no_place_from_the_one_that_is_computed():
    net = Net()
    with net.side(1) as p, net.side(2, memory="staged", staging_places=4, num_blocks=200) as d:
        queued = [d.endpoint.receive(12) for _ in range(8)]
        for number, ref in enumerate(queued):
            d.endpoint.grant(ref, 0, range(50 + 12 * number, 62 + 12 * number))
            p.endpoint.send(ref, d.peer)
        ref, there, _ = run(p, d)
        assert there.failure is None
        assert d.places_taken() == (0, 0)
        p.endpoint.offer(queued[5], 0, [1, 2])  # the first chunk of another one
        wait_until(lambda: d.delivered(queued[5]).keys() == {0, 1})
        for ref in queued:
            d.endpoint.cancel(ref)
            assert d.ended(ref).failure is Failure.CANCELLED
        all_places_back(d)


def test_a_sender_that_does_not_tell_what_it_has_is_granted_what_there_is_room_for():
    net = Net()
    p = newer(net.side(1), tells_offers=False)
    with p, net.side(2, memory="staged", staging_places=4) as d:
        _, there, here = run(p, d)
        assert there.failure is here.failure is None


@pytest.mark.parametrize(("source", "degree"), [(1, 2), (4, 2), (8, 2), (2, 8)])
def test_ranks_of_other_degrees_share_a_place(source, degree):
    """A block has one place, whichever ranks its parts come from."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 256, (8, LAYOUT.head_bytes * 4), dtype=np.uint8)
    net, mine = Net(), Shard(degree - 1, degree)
    staged = {"memory": "staged", "staging_places": 4}
    with net.side(100, shard=mine, **staged) as d:
        ref = d.endpoint.receive(8)
        d.endpoint.grant(ref, 0, range(8))
        senders = [net.side(r, shard=Shard(r, source), **staged) for r in range(source)]
        for rank, p in enumerate(senders):
            p.pool[:8] = share_of(truth, Shard(rank, source), p.pool.shape[1])
            p.__enter__()
            p.endpoint.send(ref, d.peer)
            p.endpoint.offer(ref, 0, range(8))
            p.endpoint.commit(ref, blocks=8, tokens=128)
        assert d.ended(ref).failure is None
        assert (d.pool[:8] == share_of(truth, mine, d.pool.shape[1])).all()
        all_places_back(d, *senders)
        for p in senders:
            p.__exit__()


def share_of(truth, shard, size):
    first = shard.rank * LAYOUT.num_kv_heads // shard.degree * LAYOUT.head_bytes
    return truth[:, first : first + size]


def test_what_a_sender_had_ready_before_it_was_expected_counts():
    """A rank beyond the first may hear of a transfer later than its sender does."""
    with Net().side(1, shard=Shard(1, 2), memory="staged", staging_places=4) as d:
        posted = []
        link = Mock(peer_shard=Shard(1, 2), peer=Hello(worker="p", tells_offers=True))
        link.transport, link.post = "tcp", lambda header, body=b"": posted.append(header)
        receiver = Receiver(d.endpoint._core.node, d._note)
        ref = d.endpoint._new_ref(5, None)
        head = {"transfer": ref.transfer, "epoch": ref.epoch, "incarnation": ref.incarnation}
        receiver.on_frame(link, Header(Kind.OPEN, **head), b"")
        receiver.on_frame(link, Header(Kind.KEEP, num=3, **head), b"")
        receiver.promise(ref, 5, 2, 5.0)
        receiver.admit_early(ref)
        receiver.grant(ref, 0, range(5))
        granted = [(h.first, h.num) for h in posted if h.kind == Kind.GRANT]
        assert granted == [(0, 2)], "three are ready, two find a place"


# ---- trouble, with a copy in the middle


def half_stored(net, **options):
    """A transfer of which some blocks are being written into the receiver's pool."""
    p = net.side(1, kv_lease_s=8.0).__enter__()
    d = net.side(2, memory="gated", kv_lease_s=8.0, **options).__enter__()
    ref = d.endpoint.receive(12)
    d.endpoint.grant(ref, 0, range(30, 42))
    p.endpoint.send(ref, d.peer)
    p.endpoint.offer(ref, 0, range(12))
    assert d.copies.entered.wait(10)
    return p, d, ref


ENDS = {
    "cancel": (lambda p, d, ref: d.endpoint.cancel(ref), Failure.CANCELLED),
    "peer cancels": (lambda p, d, ref: p.endpoint.cancel(ref), Failure.PEER_CANCELLED),
    "peer is gone": (lambda p, d, ref: p.endpoint.close(), Failure.LOST),
    "close": (
        lambda p, d, ref: threading.Thread(target=d.endpoint.close).start(),
        Failure.LOST,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_receiver_that_ends_while_it_stores_gives_back_those_blocks_last(end):
    net = Net()
    p, d, ref = half_stored(net)
    before = d.pool.copy()
    how, failure = ENDS[end]
    how(p, d, ref)
    d.wait(lambda _: d.released(ref))  # what had not all arrived comes back at once
    time.sleep(0.1)
    back = d.returned(ref)
    assert 0 < len(back) < 12 and not any(isinstance(e, Ended) for e in d.told())
    assert (d.pool == before).all()
    d.copies.gate.set()
    assert d.ended(ref).failure is failure
    assert d.returned(ref) == list(range(30, 42))
    for block, slot in d.delivered(ref).items():
        assert (d.pool[slot] == p.pool[block]).all()
    assert (d.pool[sorted(d.released(ref))] == before[sorted(d.released(ref))]).all()
    all_places_back(d)
    p.endpoint.close()
    d.endpoint.close()


def test_a_fence_waits_for_what_is_being_stored_and_nothing_is_written_after_it():
    net = Net()
    p, d, ref = half_stored(net)
    with pytest.raises(TimeoutError):
        d.endpoint.fence(ref, 0.2)
    d.copies.gate.set()
    d.endpoint.fence(ref)
    after = d.pool.copy()
    time.sleep(0.2)
    assert (d.pool == after).all()
    assert d.returned(ref) == list(range(30, 42))
    p.endpoint.close()
    d.endpoint.close()


@pytest.mark.parametrize("end", ENDS)
def test_a_sender_that_ends_while_it_loads_holds_those_blocks_until_it_has(end):
    net = Net()
    p = net.side(1, memory="gated", kv_lease_s=8.0).__enter__()
    d = net.side(2, kv_lease_s=8.0).__enter__()
    ref = d.endpoint.receive(12)
    d.endpoint.grant(ref, 0, range(30, 42))
    p.endpoint.send(ref, d.peer)
    p.endpoint.offer(ref, 0, range(12))
    assert p.copies.entered.wait(10)
    how, failure = ENDS[end]
    how(d, p, ref)  # the other way round
    p.wait(lambda _: p.released(ref))
    time.sleep(0.1)
    assert p.released(ref) == list(range(5, 12)), "five have places and are being read"
    assert not any(isinstance(e, Ended) for e in p.told())
    p.copies.gate.set()
    assert p.ended(ref).failure in (failure, Failure.FENCED)
    assert p.returned(ref) == list(range(12))
    all_places_back(p)
    p.endpoint.close()
    d.endpoint.close()


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_device_that_fails_ends_the_transfer_on_both_sides(which, caplog):
    net = Net()
    kinds = {"sender": ("gated", "host"), "receiver": ("host", "gated")}[which]
    with net.side(1, memory=kinds[0]) as p, net.side(2, memory=kinds[1]) as d:
        broken, other = (p, d) if which == "sender" else (d, p)
        broken.copies.error = RuntimeError("an illegal memory access was encountered")
        broken.copies.gate.set()
        before = d.pool.copy()
        ref, there, here = run(p, d)
        ended = here if which == "sender" else there
        assert (ended.failure, ended.detail) == (Failure.MEMORY, str(broken.copies.error))
        assert other.ended(ref).failure is Failure.PEER_CANCELLED
        assert p.returned(ref) == list(range(12)) and d.returned(ref) == list(range(30, 42))
        assert d.delivered(ref) == {} and (d.pool == before).all()
        all_places_back(broken)
        assert "could not be copied" in caplog.text


def test_a_lease_that_expires_frees_places_of_blocks_that_never_came():
    net = Net()
    with net.side(1) as p, net.side(2, memory="staged", staging_places=8) as d:
        ref = d.endpoint.receive(12)
        d.endpoint.grant(ref, 0, range(30, 42))
        newer(p, tells_offers=False)
        p.endpoint.send(ref, d.peer)  # as far as is known, it has everything; but it offers nothing
        wait_until(lambda: d.places_taken() == (0, 4))
        p.endpoint._core.sender._departing.clear()  # and forgets the transfer
        assert d.ended(ref).failure is Failure.LEASE
        assert d.returned(ref) == list(range(30, 42))
        all_places_back(d)


# ---- a lane by itself


def test_a_staged_pool_needs_a_place_in_each_direction():
    copies = SimpleNamespace(
        places=bytearray(64), block_bytes=64, num_blocks=9, copy_out=None, copy_in=None
    )
    with pytest.raises(ValueError, match="one for each direction"):
        StagedMemory(copies)


class ManualThread:
    """An executor whose work is done when the test says so."""

    def __init__(self):
        self.work = []

    def submit(self, function, *arguments):
        self.work.append((Future(), function, arguments))
        return self.work[-1][0]

    def shutdown(self):
        assert not self.work

    def do_one(self):
        future, function, arguments = self.work.pop(0)
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)


ACTIONS = st.lists(st.sampled_from(["claim", "ask", "do", "fail", "vacate"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_lane_copies_each_block_once_one_batch_at_a_time(actions, num_places, random):
    asyncio.run(drive(actions, num_places, random))


async def drive(actions, num_places, random):
    copied, told, asked = [], [], []
    claimed, idle = [], []  # places without a copy yet, and those whose copy is done
    is_broken = False

    def copy(slots, places):
        if is_broken:
            raise RuntimeError("no device")
        copied.extend(zip(slots, places, strict=True))

    def ask(item):
        def done(error):
            told.append((item, error))
            idle.append(item[1])

        asked.append(item)
        lane.copy(Request((item[0],), (item[1],), done))

    lane = Lane("test", range(7, 7 + num_places), copy)
    lane._thread.shutdown()
    lane._thread = thread = ManualThread()
    for action in [*actions, *["do"] * len(actions)]:
        if action == "claim":
            claimed += lane.claim(random.randrange(1, 5))
        elif action == "ask" and claimed:
            ask((len(asked), claimed.pop(random.randrange(len(claimed)))))
        elif action in ("do", "fail") and thread.work:
            is_broken = action == "fail"
            thread.do_one()
        elif action == "vacate" and idle:
            lane.vacate(idle.pop(random.randrange(len(idle))))
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(thread.work) <= 1, "two batches at once"
        assert lane.num_taken == len(claimed) + len(idle) + len(asked) - len(told) <= num_places
    await lane.close()
    assert [item for item, _ in told] == asked, "each once, in order"
    assert copied == [item for item, error in told if error is None]
