"""Asking a coordinator: for commands, and for a coordinator that asks whether another one leads."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from quire.proto import coordinator_pb2, worker_pb2
from quire.proto.coordinator_pb2_grpc import CoordinatorStub
from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from quire.cluster.rpc import Cluster
    from quire.proto.coordinator_pb2_grpc import CoordinatorAsyncStub
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

TIMEOUT_S = 90.0
"""Ray may have to start a process on every node before it can say whether a model is there."""
LEADER_TIMEOUT_S = 3.0


class CoordinatorError(Exception):
    """The coordinator cannot be reached or refuses; the message is for people."""


class CoordinatorClient:
    """Methods raise CoordinatorError."""

    def __init__(self, address: str, cluster: Cluster) -> None:
        self._address, self._cluster = address, cluster

    async def status(self) -> coordinator_pb2.FleetStatus:
        """Everything about the fleet."""
        async with self._stub() as stub:
            return await stub.Status(coordinator_pb2.StatusRequest(), timeout=TIMEOUT_S)

    async def scale(self, replicas: Mapping[str, int]) -> None:
        """Other numbers of replicas, pool -> number."""
        async with self._stub() as stub:
            await stub.Scale(coordinator_pb2.ScaleRequest(replicas=replicas), timeout=TIMEOUT_S)

    async def set_role(self, pod: str, role: str) -> None:
        """Another role for a pod."""
        async with self._stub() as stub:
            request = coordinator_pb2.SetRoleRequest(pod=pod, role=role)
            await stub.SetRole(request, timeout=TIMEOUT_S)

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[CoordinatorAsyncStub]:
        try:
            async with self._cluster.channel(self._address) as channel:
                yield CoordinatorStub(channel)
        except grpc.aio.AioRpcError as error:
            if "failed to connect" in (error.details() or ""):
                message = f"no coordinator answers at {self._address}: start it with quire up"
                raise CoordinatorError(message) from None
            raise CoordinatorError(error.details() or error.code().name) from None


async def leads(cluster: Cluster, leader: Mapping[str, Any]) -> bool:
    """Whether a recorded coordinator is there and still in its term."""
    async with cluster.channel(leader["address"]) as channel:
        stub: CoordinatorAsyncStub = CoordinatorStub(channel)
        try:
            status = await stub.Status(coordinator_pb2.StatusRequest(), timeout=LEADER_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(status.term == leader["term"] and status.pid == leader["pid"])


async def drain_engine(cluster: Cluster, address: str) -> None:
    """Have an engine end that no supervisor looks after. One that is gone is no error."""
    async with cluster.channel(address) as channel:
        stub: WorkerAsyncStub = WorkerStub(channel)
        try:
            request = worker_pb2.ControlRequest(drain=worker_pb2.Drain())
            await stub.Control(request, timeout=LEADER_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return
