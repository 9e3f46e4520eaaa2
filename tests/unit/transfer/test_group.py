"""Endpoints of several ranks used as one: every block of every rank comes, and goes back, once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transfers import LAYOUT, config

from quire.engine.runner.pool_copies import PoolCopies
from quire.transfer.endpoint import Endpoint
from quire.transfer.group import GroupEndpoint, identity_of
from quire.transfer.layout import Shard, block_bytes, heads_of
from quire.transfer.local import LocalNetwork, LocalTransport
from quire.transfer.memory import HostMemory, PoolMemory
from quire.transfer.negotiate import Identity
from quire.transfer.staging import StagedMemory
from quire.transfer.state import Delivered, Ended, Failure, Released, new_number

NUM_BLOCKS = 24
WAIT_S = 15


class LocalRanks:
    """The other ranks of a side, in this process, on a thread that is `slow_s` late to expect."""

    def __init__(self, side: Worker, slow_s: float) -> None:
        self.side, self.slow_s = side, slow_s
        self.verbs = ThreadPoolExecutor(1)

    def start(self, config, identity, on_event):
        self.endpoints = {}
        peers = []
        for rank in range(1, identity.shard.degree):
            endpoint = Endpoint(
                config,
                identity_of(identity, rank),
                self.side.memory(rank),
                lambda event, rank=rank: on_event(rank, event),
                [LocalTransport(self.side.network)],
            )
            peers.append(endpoint.start())
            self.endpoints[rank] = endpoint
        return tuple(peers)

    def expect(self, leg, num_blocks, degree, lease_s):
        self.verbs.submit(time.sleep, self.slow_s)
        expect = self.endpoints[leg[0]].expect
        self.verbs.submit(expect, leg[1], num_blocks, degree=degree, lease_s=lease_s)

    def send(self, leg, peer, lease_s):
        self.verbs.submit(self.endpoints[leg[0]].send, leg[1], peer, lease_s=lease_s)

    def commit(self, leg, commit):
        given = {"blocks": commit.blocks, "tokens": commit.tokens, "meta": commit.meta}
        self.verbs.submit(self.endpoints[leg[0]].commit, leg[1], **given)

    def fence(self, leg, timeout_s):
        self.verbs.submit(self.endpoints[leg[0]].fence, leg[1]).result(timeout_s)

    def flush(self):
        """Return when every verb so far was carried out."""
        self.verbs.submit(lambda: None).result(WAIT_S)

    def close(self):
        self.verbs.shutdown()
        for endpoint in self.endpoints.values():
            endpoint.close()

    def __getattr__(self, verb):
        def post(leg, *args):
            self.verbs.submit(getattr(self.endpoints[leg[0]], verb), leg[1], *args)

        return post


class Worker:
    """A worker of some degree over pools that are its ranks' parts of `whole`."""

    def __init__(self, network, degree: int, whole: np.ndarray, slow_s: float = 0.0, **options):
        self.network = network
        self.places = options.pop("places", None)
        parts = [heads_of(LAYOUT.num_kv_heads, Shard(rank, degree)) for rank in range(degree)]
        self.heads = parts
        self.pools = [
            np.ascontiguousarray(whole[:, p.start : p.stop]).reshape(len(whole), -1) for p in parts
        ]
        settings = config(**options)
        identity = Identity(
            LAYOUT, Shard(0, degree), f"worker-{new_number()}", new_number(),
            settings.kv_heartbeat_s, settings.cluster_token or "",
        )  # fmt: skip
        self.events, self.changed = [], threading.Condition()
        self.ranks = LocalRanks(self, slow_s) if degree > 1 else None
        self.endpoint = GroupEndpoint(settings, identity, self.memory(0), self.note, self.ranks)
        self.endpoint._core._transports = {"tcp": LocalTransport(network)}

    def __enter__(self):
        self.peer = self.endpoint.start()
        return self

    def __exit__(self, *_):
        self.endpoint.close()
        if self.ranks is not None:
            self.ranks.close()

    def memory(self, rank: int) -> PoolMemory:
        pool, size = self.pools[rank], block_bytes(LAYOUT, Shard(rank, len(self.heads)))
        if self.places is None:
            return HostMemory(pool, size)
        return StagedMemory(PoolCopies(torch.from_numpy(pool), self.places * size))

    def note(self, event):
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def ended(self, ref) -> Ended:
        def found():
            return [e for e in self.events if isinstance(e, Ended) and e.ref == ref]

        with self.changed:
            assert self.changed.wait_for(found, WAIT_S), self.events
            return found()[0]

    def returned(self, ref, count: int) -> list[int]:
        """Every block that came back, in either way, once there are `count`."""

        def found():
            mine = [e for e in self.events if e.ref == ref]
            released = [s for e in mine if isinstance(e, Released) for s in e.slots]
            return sorted(released + [e.slot for e in mine if isinstance(e, Delivered)])

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, WAIT_S), self.events
            return found()


def random_pool(seed: int) -> np.ndarray:
    """[blocks, heads, bytes of a head]."""
    shape = (NUM_BLOCKS, LAYOUT.num_kv_heads, LAYOUT.head_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def transfer(p: Worker, d: Worker, blocks: int):
    ref = d.endpoint.receive(blocks)
    p.endpoint.send(ref, d.peer)
    p.endpoint.offer(ref, 0, range(blocks))
    d.endpoint.grant(ref, 0, range(10, 10 + blocks // 2))
    d.endpoint.grant(ref, blocks // 2, range(10 + blocks // 2, 10 + blocks))
    p.endpoint.commit(ref, blocks=blocks, tokens=16 * blocks, meta=b"first")
    return ref


@pytest.mark.parametrize(
    ("sending", "receiving"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 2), (1, 8)]
)
@pytest.mark.parametrize(("slow_s", "places"), [(0.0, None), (0.3, None), (0.1, 4)])
def test_every_rank_gets_its_heads_of_every_block(sending, receiving, slow_s, places):
    network, whole = LocalNetwork(), random_pool(1)
    with (
        Worker(network, sending, whole, places=places, kv_lease_s=10) as p,
        Worker(network, receiving, random_pool(2), slow_s, places=places, kv_lease_s=10) as d,
    ):
        ref = transfer(p, d, 8)
        there, here = d.ended(ref), p.ended(ref)
        assert there.failure is here.failure is None
        assert there.commit.meta == b"first"
        assert d.returned(ref, 8) == list(range(10, 18))
        assert p.returned(ref, 8) == list(range(8))
        assert sum(isinstance(e, Delivered) for e in d.events) == 8
        for heads, pool in zip(d.heads, d.pools, strict=True):
            want = whole[:8, heads.start : heads.stop].reshape(8, -1)
            assert (pool[10:18] == want).all()
        assert not d.endpoint._joined and not p.endpoint._joined


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_cancel_ends_it_on_every_rank(who):
    network = LocalNetwork()
    with Worker(network, 2, random_pool(1)) as p, Worker(network, 4, random_pool(2)) as d:
        ref = d.endpoint.receive(8)
        d.endpoint.grant(ref, 0, range(8))
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, range(4))
        (p if who == "sender" else d).endpoint.cancel(ref)
        assert d.ended(ref).failure is not None
        assert p.ended(ref).failure is not None
        assert d.returned(ref, 8) == list(range(8))
        assert p.returned(ref, 4) == list(range(4))
        d.endpoint.grant(ref, 8, [9])  # too late: it comes straight back
        assert 9 in d.returned(ref, 9)


def test_one_rank_that_fails_fails_it_everywhere():
    network = LocalNetwork()
    with Worker(network, 1, random_pool(1)) as p, Worker(network, 2, random_pool(2)) as d:
        ref = d.endpoint.receive(6)
        d.endpoint.grant(ref, 0, range(6))
        p.endpoint.send(ref, d.peer)
        d.ranks.flush()
        d.ranks.endpoints[1].close()
        p.endpoint.offer(ref, 0, range(6))
        assert d.ended(ref).failure is not None
        assert p.ended(ref).failure is not None
        assert d.returned(ref, 6) == list(range(6))
        assert p.returned(ref, 6) == list(range(6))


def test_a_rank_that_is_gone_before_it_hears_of_a_transfer_fails_it_everywhere():
    network = LocalNetwork()
    with Worker(network, 1, random_pool(1)) as p, Worker(network, 2, random_pool(2), 0.2) as d:
        ref = d.endpoint.receive(6)
        d.endpoint.grant(ref, 0, range(6))
        d.ranks.endpoints[1].close()
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, range(6))
        assert d.ended(ref).failure in (Failure.CANCELLED, Failure.PEER_CANCELLED)
        assert p.ended(ref).failure is not None
        assert d.returned(ref, 6) == list(range(6))
        assert p.returned(ref, 6) == list(range(6))


def test_a_fence_holds_on_every_rank():
    network = LocalNetwork()
    with Worker(network, 2, random_pool(1)) as p, Worker(network, 2, random_pool(2)) as d:
        ref = d.endpoint.receive(6)
        d.endpoint.grant(ref, 0, range(6))
        d.endpoint.fence(ref)
        before = [pool.copy() for pool in d.pools]
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, range(6))
        assert p.ended(ref).failure is not None
        assert all((a == b).all() for a, b in zip(before, d.pools, strict=True))


def test_heads_that_cannot_be_split_so_are_said():
    network = LocalNetwork()
    with Worker(network, 1, random_pool(1)) as p, Worker(network, 1, random_pool(2)) as d:
        ref = d.endpoint.receive(1)
        p.endpoint.send(ref, replace(d.peer, shard=Shard(0, 3)))
        assert p.ended(ref).failure is Failure.INCOMPATIBLE
