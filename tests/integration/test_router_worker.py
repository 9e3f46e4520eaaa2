"""A router that watches a real worker around an engine: what it is told is what is there."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import grpc
import pytest
from engines import make_engine
from prometheus_client.registry import CollectorRegistry
from waiting import until

from quire.api import block_hash
from quire.config.router import RouterConfig
from quire.proto import common_pb2, worker_pb2, worker_pb2_grpc
from quire.router.discovery import StaticPods
from quire.router.pods import watch_pods
from quire.router.query import RouteQuery
from quire.router.router import Router
from quire.telemetry import metrics as m
from quire.worker import cache_feed
from quire.worker.metrics import EngineMetrics
from quire.worker.servicer import WorkerService

LIMIT_S = 30
PROMPT = [1 + i % 40 for i in range(100)]


@contextlib.asynccontextmanager
async def worker():
    registry = CollectorRegistry()
    service = WorkerService(EngineMetrics(m.engine_instruments(registry, model_name="x")), registry)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    engine = make_engine()
    engine.runner.backend = SimpleNamespace(layout=SimpleNamespace(block_bytes=1024))
    loop = service.attach(engine, None)
    try:
        yield f"127.0.0.1:{port}", loop
    finally:
        await service.detach()
        loop.stop(5.0)
        await server.stop(grace=None)


@contextlib.asynccontextmanager
async def watching(router: Router, address: str):
    instruments = m.router_instruments(CollectorRegistry())
    watch = watch_pods(StaticPods({"a": address}), router.fleet, router.clock, instruments)
    task = asyncio.create_task(watch)
    try:
        yield instruments
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def complete(address: str) -> int:
    """One request, to its end; returns the cached prompt tokens."""
    submit = worker_pb2.Submit(request=1, request_id="r", prompt_token_ids=PROMPT)
    submit.sampling.CopyFrom(common_pb2.Sampling(n=1, max_tokens=3, ignore_eos=True, seed=1))
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(worker_pb2.SessionRequest(submit=submit))
        cached = 0
        while True:
            reply = await call.read()
            for output in reply.batch.outputs:
                cached += output.admission.cached_tokens
                if output.finish_reason:
                    call.cancel()
                    return cached


@pytest.mark.parametrize("part_blocks", [4096, 2], ids=["one message", "snapshots in parts"])
async def test_what_the_router_expects_is_what_the_worker_finds(part_blocks, monkeypatch):
    monkeypatch.setattr(cache_feed, "PART_BLOCKS", part_blocks)
    monkeypatch.setattr(cache_feed, "DIGEST_PERIOD_S", 0.05)
    hashes = b"".join(block_hash.extend(block_hash.root(b"fake"), PROMPT))
    async with worker() as (address, loop):
        early, late = (Router(RouterConfig(in_flight_ttl_s=0.1)) for _ in range(2))
        async with watching(early, address) as instruments:
            await until(lambda: early.fleet.states(early.clock())["serving"] == 1)
            assert await complete(address) == 0
            pool = loop.engine.pool
            known = early.fleet.index
            slot = early.fleet.pods["a"].slot
            await until(lambda: known.count(slot) == pool.digest().count >= 6)
            assert known.hash_xor(slot) == pool.digest().hash_xor
            async with watching(late, address):  # by a snapshot what the other got by events
                await until(lambda: late.fleet.states(late.clock())["serving"] == 1)
                await until(lambda: late.fleet.index.count(late.fleet.pods["a"].slot) >= 6)
                decisions = [
                    r.route(RouteQuery(hashes=hashes, prompt_len=100)) for r in (early, late)
                ]
            actual = await complete(address)
            assert [d.decode_cached_tokens for d in decisions] == [actual, actual] == [96, 96]
            loop.call(lambda engine: engine.reset_prefix_cache())
            await until(lambda: known.count(slot) == 0)
            assert not any(
                instruments.get(m.ROUTER_RESYNCS, reason).value for reason in ("gap", "digest")
            )
