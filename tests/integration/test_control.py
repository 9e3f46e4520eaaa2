"""What can be asked of a running worker: its role, its health, to sleep and to wake up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_disaggregated import ENGINE, prompt, submit
from workers import WorkerProcess, ask

from quire.proto import worker_pb2

Control = worker_pb2.ControlRequest
MIB = 1 << 20


@pytest_asyncio.fixture
async def worker(tmp_path_factory):
    worker = WorkerProcess(tmp_path_factory.mktemp("worker"), "worker", ENGINE)
    try:
        await worker.ready()
        yield worker
    finally:
        await worker.stop()


async def control(worker: WorkerProcess, **command) -> worker_pb2.ControlReply:
    return await worker.stub.Control(Control(**command), timeout=40)


async def serving(worker: WorkerProcess, service: str) -> bool:
    stub = health_pb2_grpc.HealthStub(worker.channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_commands(worker) -> None:
    await roles_take_effect_at_once(worker)
    await a_worker_sleeps_and_wakes_up(worker)
    await it_does_not_sleep_over_requests(worker)
    await health_says_how_it_is(worker)


async def roles_take_effect_at_once(worker) -> None:
    updates = worker.stub.Watch(worker_pb2.WatchRequest(), timeout=30)
    loads = (update.load async for update in updates if update.HasField("load"))
    first = await anext(loads)
    assert (first.prefill_weight, first.decode_weight) == (1.0, 1.0)
    reply = await control(worker, set_role=worker_pb2.SetRole(prefill_weight=0.5))
    assert reply.ok, reply.message
    while (load := await anext(loads)).decode_weight == 1.0:
        pass
    assert (load.prefill_weight, load.decode_weight) == (0.5, 0.0)
    updates.cancel()
    for wrong in ({"prefill_weight": 2.0}, {"prefill_weight": 0.0}):
        assert not (await control(worker, set_role=worker_pb2.SetRole(**wrong))).ok
    assert (await worker.load()).prefill_weight == 0.5
    both = worker_pb2.SetRole(prefill_weight=1, decode_weight=1)
    assert (await control(worker, set_role=both)).ok


def resident(worker: WorkerProcess) -> int:
    statm = Path(f"/proc/{worker.process.pid}/statm").read_text()
    return int(statm.split()[1]) * 4096


async def a_worker_sleeps_and_wakes_up(worker) -> None:
    requests = [submit(i, prompt(i, 900), max_tokens=20, ignore_eos=True) for i in range(12)]
    want = await ask(worker, requests)
    before = resident(worker)
    reply = await control(worker, sleep=worker_pb2.Sleep(level=1))
    assert reply.ok, reply.message
    assert reply.freed_bytes > 20 * MIB
    assert resident(worker) < before - 20 * MIB
    load = await worker.load()
    assert load.sleeping
    assert load.draining
    assert load.blocks_cached == 0
    assert not await serving(worker, "readiness")
    assert await serving(worker, "liveness")
    [refused] = await ask(worker, [submit(99, [1, 2, 3])])
    assert refused.failure.code == worker_pb2.Failure.CODE_NOT_READY
    assert (await control(worker, wake=worker_pb2.Wake())).ok
    assert await serving(worker, "readiness")
    got = await ask(worker, requests)
    assert [a.tokens for a in got] == [a.tokens for a in want]
    assert not (await control(worker, sleep=worker_pb2.Sleep(level=2))).ok


async def it_does_not_sleep_over_requests(worker) -> None:
    asking = asyncio.create_task(
        ask(worker, [submit(1, [5] * 40, n=8, max_tokens=900, ignore_eos=True)])
    )
    while not (await worker.load()).running:
        pass
    reply = await control(worker, sleep=worker_pb2.Sleep(level=1, timeout_ms=50))
    assert not reply.ok
    assert not (await worker.load()).sleeping
    [answer] = await asking
    assert answer.failure is None
    assert (await control(worker, sleep=worker_pb2.Sleep(level=1))).ok
    assert (await control(worker, sleep=worker_pb2.Sleep(level=1))).ok
    assert (await control(worker, wake=worker_pb2.Wake())).ok


async def health_says_how_it_is(worker) -> None:
    reply = await control(worker, health=worker_pb2.Health())
    assert reply.ok
    health = reply.health
    assert health.live
    assert health.ready
    assert health.steps > 0
    assert (health.running, health.waiting, health.blocks_owned) == (0, 0, 0)
    assert (health.prefill_weight, health.decode_weight) == (1.0, 1.0)
    assert not health.draining
    assert await serving(worker, "quire.v1.Worker")
