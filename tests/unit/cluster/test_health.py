"""The standard health service: what it says, and how its streams end."""

from __future__ import annotations

from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster.health import HealthService

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    is_ready = False


@asynccontextmanager
async def served(tmp_path):
    process = Process()
    health = HealthService("quire.v1.Worker", lambda: True, lambda: process.is_ready)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = f"unix:{tmp_path}/health.sock"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield process, health, server, health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_liveness_and_readiness_are_told_apart(tmp_path) -> None:
    async with served(tmp_path) as (_, _, _, stub):
        assert (await stub.Check(request("liveness"))).status == SERVING
        assert (await stub.Check(request("quire.v1.Worker"))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(request("another"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_who_watches_hears_changes_and_of_the_end_as_such(tmp_path, caplog) -> None:
    async with served(tmp_path) as (process, health, server, stub):
        call = stub.Watch(request("readiness"))
        assert (await call.read()).status == NOT_SERVING
        process.is_ready = True
        assert (await call.read()).status == SERVING
        health.end()
        await server.stop(5)
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []
