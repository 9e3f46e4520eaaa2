"""Following a pod through lost, repeated and late messages, restarts and evictions."""

from __future__ import annotations

from functools import reduce
from operator import xor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from routing import chain

from quire.proto import worker_pb2
from quire.router.fleet import Fleet
from quire.router.follower import Follower, OutOfSync
from quire.router.hash_table import keys_of
from quire.router.reports import PodModel

POOL = chain(*range(12))
EVENT = worker_pb2.CacheEvent


class FollowedPod(RuleBasedStateMachine):
    """A pod's cache, a channel that loses and repeats, and a follower that must never be wrong."""

    @initialize()
    def start(self) -> None:
        self.fleet = Fleet(in_flight_ttl_s=2.0, stale_after_s=2.0)
        self.fleet.connect(PodModel(pod="other"), 0.0)
        self.incarnation, self.blocks, self.number = 0, set(), 0
        self.pending: list[worker_pb2.CacheEvent] = []
        self.last: worker_pb2.CacheEvents | None = None
        self.restart()

    @rule()
    def restart(self) -> None:
        self.incarnation += 1
        self.blocks, self.number, self.pending, self.last = set(), 0, [], None
        pod = self.fleet.connect(PodModel(pod="a", incarnation=self.incarnation), 0.0)
        self.follower = Follower(self.fleet, pod)
        self.snapshot(1)

    @rule(parts=st.integers(1, 3))
    def snapshot(self, parts: int) -> None:
        stored = [EVENT(kind=EVENT.KIND_STORED, block_hash=h) for h in self.blocks]
        self.pending.clear()
        for part in range(parts):
            message = self.message(stored[part::parts], self.number)
            message.snapshot, message.more = True, part < parts - 1
            self.follower.take(message)

    @rule(h=st.sampled_from(POOL))
    def change(self, h: bytes) -> None:
        kind = EVENT.KIND_REMOVED if h in self.blocks else EVENT.KIND_STORED
        self.blocks ^= {h}
        self.event(EVENT(kind=kind, block_hash=h))

    @rule()
    def clear(self) -> None:
        self.blocks.clear()
        self.event(EVENT(kind=EVENT.KIND_CLEARED))

    @rule(lost=st.booleans())
    def send(self, lost: bool) -> None:
        if not self.pending:
            return
        message = self.message(self.pending, self.number - len(self.pending) + 1)
        self.pending = []
        if not lost:
            self.last = message
            self.take(message)

    @rule()
    def repeat(self) -> None:
        if self.last is not None:
            with pytest.raises(OutOfSync):
                self.follower.take(self.last)
            self.snapshot(1)

    @rule()
    def another_incarnation_speaks(self) -> None:
        message = self.message([], self.number + 1)
        message.incarnation += 1
        with pytest.raises(OutOfSync):
            self.follower.take(message)
        self.snapshot(2)

    @rule()
    def digest(self) -> None:
        value = reduce(xor, (int.from_bytes(h, "little") for h in self.blocks), 0)
        digest = worker_pb2.CacheDigest(
            incarnation=self.incarnation,
            sequence=self.number,
            count=len(self.blocks),
            hash_xor=value.to_bytes(16, "little"),
        )
        # what the follower knows is right, or of another moment: never a mismatch
        assert self.follower.check(digest) is (self.follower.sequence == self.number)

    @invariant()
    def in_sync_means_equal(self) -> None:
        if not hasattr(self, "follower"):
            return
        self.fleet.index.check_integrity()
        if self.follower.sequence == self.number:
            slot = self.follower.pod.slot
            held = {h for h in POOL if self.fleet.index.holds(slot, h)}
            assert held == self.blocks
            depth = next((i for i, h in enumerate(POOL) if h not in held), len(POOL))
            assert self.fleet.index.depths(keys_of(POOL), 16)[slot] == depth

    def event(self, event: worker_pb2.CacheEvent) -> None:
        self.number += 1
        self.pending.append(event)

    def message(self, events: list[worker_pb2.CacheEvent], first: int) -> worker_pb2.CacheEvents:
        return worker_pb2.CacheEvents(
            incarnation=self.incarnation, first_sequence=first, events=events
        )

    def take(self, message: worker_pb2.CacheEvents) -> None:
        expected = (self.follower.sequence or 0) + 1
        if message.first_sequence == expected:
            self.follower.take(message)
        else:
            with pytest.raises(OutOfSync):
                self.follower.take(message)
            assert self.follower.pod.resync
            self.snapshot(1)
            assert not self.follower.pod.resync


TestFollowedPod = FollowedPod.TestCase
TestFollowedPod.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def followed() -> tuple[Fleet, Follower]:
    fleet = Fleet(in_flight_ttl_s=2.0, stale_after_s=2.0)
    return fleet, Follower(fleet, fleet.connect(PodModel(pod="a", incarnation=1), 0.0))


def test_events_before_a_snapshot_are_not_believed() -> None:
    _, follower = followed()
    with pytest.raises(OutOfSync):
        follower.take(worker_pb2.CacheEvents(incarnation=1, first_sequence=1))


def test_events_inside_a_snapshot_make_it_start_again() -> None:
    fleet, follower = followed()
    part = worker_pb2.CacheEvents(incarnation=1, first_sequence=5, snapshot=True, more=True)
    part.events.append(EVENT(kind=EVENT.KIND_STORED, block_hash=POOL[0]))
    follower.take(part)
    with pytest.raises(OutOfSync):
        follower.take(worker_pb2.CacheEvents(incarnation=1, first_sequence=6))
    whole = worker_pb2.CacheEvents(incarnation=1, first_sequence=6, snapshot=True)
    follower.take(whole)
    assert fleet.index.count(follower.pod.slot) == 0


def test_another_digest_is_out_of_sync() -> None:
    _, follower = followed()
    follower.take(worker_pb2.CacheEvents(incarnation=1, first_sequence=3, snapshot=True))
    later = worker_pb2.CacheDigest(incarnation=1, sequence=4, count=9, hash_xor=bytes(16))
    assert not follower.check(later)
    wrong = worker_pb2.CacheDigest(incarnation=1, sequence=3, count=9, hash_xor=bytes(16))
    with pytest.raises(OutOfSync, match="digest"):
        follower.check(wrong)


def test_a_hash_of_another_length_is_refused() -> None:
    _, follower = followed()
    message = worker_pb2.CacheEvents(incarnation=1, first_sequence=1, snapshot=True)
    message.events.append(EVENT(kind=EVENT.KIND_STORED, block_hash=b"short"))
    with pytest.raises(ValueError, match="16 bytes"):
        follower.take(message)
