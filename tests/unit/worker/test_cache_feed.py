"""The feed of cache events: snapshot, then deltas without gaps, and digests of the same moment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quire.api import block_hash
from quire.engine.kv.pool import BlockPool
from quire.proto import worker_pb2
from quire.worker import cache_feed
from quire.worker.cache_feed import CacheFeed

ROOT = block_hash.root(b"model")


class CallAtOnce:
    """An engine loop's `call`, run in place."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool

    def call(self, function) -> None:
        function(SimpleNamespace(pool=self.pool))


def store(pool: BlockPool, first: int, count: int) -> None:
    tokens = [t for b in range(first, first + count) for t in [b] * 16]
    blocks, hashes = pool.allocate(count), block_hash.extend(ROOT, tokens)
    for block, h, parent in zip(blocks, hashes, [ROOT, *hashes], strict=False):
        pool.register(block, h, parent)


def events(updates):
    return [u.cache_events for u in updates if u.HasField("cache_events")]


async def test_a_new_reader_gets_a_snapshot_in_parts_then_deltas(monkeypatch):
    monkeypatch.setattr(cache_feed, "PART_BLOCKS", 4)
    pool, feed = BlockPool(32), CacheFeed(7, worker_pb2.WatchRequest(cache_events=True))
    store(pool, 0, 10)
    parts = events(await feed.updates(CallAtOnce(pool)))
    assert [(len(p.events), p.snapshot, p.more) for p in parts] == [
        (4, True, True),
        (4, True, True),
        (2, True, False),
    ]
    assert {p.first_sequence for p in parts} == {10}
    store(pool, 50, 5)
    deltas = events(await feed.updates(CallAtOnce(pool)))
    assert [(p.first_sequence, len(p.events), p.snapshot) for p in deltas] == [
        (11, 4, False),
        (15, 1, False),
    ]
    assert events(await feed.updates(CallAtOnce(pool))) == []


async def test_an_empty_cache_has_a_snapshot_too():
    feed = CacheFeed(7, worker_pb2.WatchRequest(cache_events=True))
    updates = await feed.updates(CallAtOnce(BlockPool(4)))
    assert [(p.snapshot, len(p.events)) for p in events(updates)] == [(True, 0)]
    assert updates[-1].cache_digest.count == 0


@pytest.mark.parametrize(
    ("incarnation", "after", "snapshot"),
    [(7, 3, False), (8, 3, True), (7, 99, True)],
    ids=["resumes", "another incarnation", "a number that was never sent"],
)
async def test_a_reader_resumes_only_where_it_can(incarnation, after, snapshot):
    pool = BlockPool(32)
    store(pool, 0, 5)
    request = worker_pb2.WatchRequest(
        cache_events=True, incarnation=incarnation, after_sequence=after
    )
    (first,) = events(await CacheFeed(7, request).updates(CallAtOnce(pool)))
    assert first.snapshot is snapshot
    assert len(first.events) == (5 if snapshot else 2)


async def test_the_digest_is_of_the_moment_of_its_events():
    pool, feed = BlockPool(32), CacheFeed(7, worker_pb2.WatchRequest(cache_events=True))
    store(pool, 0, 3)
    updates = await feed.updates(CallAtOnce(pool))
    digest = updates[-1].cache_digest
    assert (digest.sequence, digest.count, digest.hash_xor) == (3, 3, pool.digest().hash_xor)
