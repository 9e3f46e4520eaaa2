"""A pod's Watch without an engine: a set of blocks, and faults on request."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from quire.proto import worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TICK_S = 0.01


@dataclass
class FakePod(worker_pb2_grpc.WorkerServicer):
    """Snapshots, deltas, digests and loads of `blocks`; the test changes them by the methods."""

    incarnation: int = 1
    model: str = "demo"
    blocks: set[bytes] = field(default_factory=set)
    events: list[worker_pb2.CacheEvent] = field(default_factory=list)
    """Event i has number i + 1."""
    load: worker_pb2.Load = field(default_factory=lambda: worker_pb2.Load(blocks_free=1000))
    requests: list[worker_pb2.WatchRequest] = field(default_factory=list)
    skip: int = 0
    """Swallow this many events: the reader sees a gap."""
    silent: bool = False
    """Send nothing, keep the call."""
    lie: bool = False
    """Send a wrong digest once."""

    def store(self, *hashes: bytes) -> None:
        for h in hashes:
            self.blocks.add(h)
            kind = worker_pb2.CacheEvent.KIND_STORED
            self.events.append(worker_pb2.CacheEvent(kind=kind, block_hash=h))

    def remove(self, *hashes: bytes) -> None:
        for h in hashes:
            self.blocks.discard(h)
            kind = worker_pb2.CacheEvent.KIND_REMOVED
            self.events.append(worker_pb2.CacheEvent(kind=kind, block_hash=h))

    def clear(self) -> None:
        self.blocks.clear()
        kind = worker_pb2.CacheEvent.KIND_CLEARED
        self.events.append(worker_pb2.CacheEvent(kind=kind))

    def restart(self) -> None:
        self.incarnation += 1
        self.blocks.clear()
        self.events.clear()

    async def Watch(self, request, context):
        self.requests.append(request)
        yield worker_pb2.WorkerUpdate(model=self.info())
        resumes = request.incarnation == self.incarnation
        sent = request.after_sequence if resumes else len(self.events)
        if not resumes:
            yield worker_pb2.WorkerUpdate(cache_events=self.snapshot())
        incarnation = self.incarnation
        while incarnation == self.incarnation:
            if not self.silent:
                if sent < len(self.events):
                    first = sent + 1 + self.skip
                    self.skip = 0
                    delta = worker_pb2.CacheEvents(
                        incarnation=self.incarnation,
                        first_sequence=first,
                        events=self.events[first - 1 :],
                    )
                    sent = len(self.events)
                    yield worker_pb2.WorkerUpdate(cache_events=delta)
                yield worker_pb2.WorkerUpdate(load=self.load)
                yield worker_pb2.WorkerUpdate(cache_digest=self.digest())
            await asyncio.sleep(TICK_S)

    def info(self) -> worker_pb2.ModelInfo:
        return worker_pb2.ModelInfo(
            model=self.model,
            block_size=16,
            num_blocks=1000,
            block_bytes=1 << 16,
            max_num_seqs=64,
            incarnation=self.incarnation,
        )

    def snapshot(self) -> worker_pb2.CacheEvents:
        kind = worker_pb2.CacheEvent.KIND_STORED
        stored = [worker_pb2.CacheEvent(kind=kind, block_hash=h) for h in self.blocks]
        return worker_pb2.CacheEvents(
            incarnation=self.incarnation,
            first_sequence=len(self.events),
            events=stored,
            snapshot=True,
        )

    def digest(self) -> worker_pb2.CacheDigest:
        xor = 0
        for h in self.blocks:
            xor ^= int.from_bytes(h, "little")
        count, self.lie = len(self.blocks) + self.lie, False
        return worker_pb2.CacheDigest(
            incarnation=self.incarnation,
            sequence=len(self.events),
            count=count,
            hash_xor=xor.to_bytes(16, "little"),
        )


@contextlib.asynccontextmanager
async def serving(servicer: FakePod, port: int = 0) -> AsyncIterator[str]:
    """The pod on the wire; gives its address."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
