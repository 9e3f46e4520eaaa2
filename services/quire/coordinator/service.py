"""The coordinator behind gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import grpc

from quire.coordinator.placement import HeadAway
from quire.coordinator.reconcile import State
from quire.coordinator.replica import Replica
from quire.coordinator.room import Refused
from quire.coordinator.supervisor import WEIGHTS
from quire.proto import coordinator_pb2, coordinator_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from quire.coordinator.coordinator import Coordinator
    from quire.coordinator.placement import RayCluster

SIGN_OF_LIFE_S = 2.0


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """Serves from the start: before the coordinator is in charge, its predecessor's topology."""

    def __init__(self, coordinator: Coordinator, cluster: RayCluster) -> None:
        self._coordinator, self._cluster = coordinator, cluster
        self.charge = asyncio.Event()
        self._is_over = False

    def end(self) -> None:
        """The server stops next: end the streams, or it cuts them off and logs them as failed."""
        self._is_over = True
        self._coordinator.tell_readers()

    @property
    def in_charge(self) -> bool:
        """The fleet is ours to change."""
        return self.charge.is_set()

    async def Watch(
        self,
        request: coordinator_pb2.TopologyRequest,
        context: grpc.aio.ServicerContext[
            coordinator_pb2.TopologyRequest, coordinator_pb2.Topology
        ],
    ) -> AsyncIterator[coordinator_pb2.Topology]:
        """The pods of one model. A reader that is slow gets the latest, not all."""
        model = request.model or self._only_model()
        names = [model.name for model in self._coordinator.fleet.models]
        if model not in names:
            have = ", ".join(names)
            said = f"the fleet has no model {model}" if model else "the fleet has several models"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{said}: ask for one of {have}")
        while not self._is_over:
            if self._coordinator.term:
                yield self._topology(model)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    await self._coordinator.changed()

    def _only_model(self) -> str:
        models = self._coordinator.fleet.models
        return models[0].name if len(models) == 1 else ""

    def _topology(self, model: str) -> coordinator_pb2.Topology:
        topology = self._coordinator.topology
        return coordinator_pb2.Topology(
            fleet=topology.fleet,
            term=topology.epoch.term,
            version=topology.epoch.version,
            model=model,
            pods=[
                coordinator_pb2.Pod(name=pod.name, address=pod.address, pool=pod.pool)
                for pod in topology.pods
                if pod.model == model
            ],
        )

    async def Scale(
        self,
        request: coordinator_pb2.ScaleRequest,
        context: grpc.aio.ServicerContext[coordinator_pb2.ScaleRequest, coordinator_pb2.ScaleReply],
    ) -> coordinator_pb2.ScaleReply:
        """All of it or nothing."""
        await self._require_charge(context)
        try:
            await self._coordinator.scale(dict(request.replicas))
        except Refused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except HeadAway as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{error}: nothing can be placed now")
        return coordinator_pb2.ScaleReply()

    async def SetRole(
        self,
        request: coordinator_pb2.SetRoleRequest,
        context: grpc.aio.ServicerContext[
            coordinator_pb2.SetRoleRequest, coordinator_pb2.SetRoleReply
        ],
    ) -> coordinator_pb2.SetRoleReply:
        """Done when answered."""
        await self._require_charge(context)
        if request.role not in WEIGHTS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"a role is one of {', '.join(WEIGHTS)}, not {request.role!r}",
            )
        try:
            await self._coordinator.set_role(request.pod, request.role)
        except Refused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return coordinator_pb2.SetRoleReply()

    async def Status(
        self,
        request: coordinator_pb2.StatusRequest,
        context: grpc.aio.ServicerContext[
            coordinator_pb2.StatusRequest, coordinator_pb2.FleetStatus
        ],
    ) -> coordinator_pb2.FleetStatus:
        """Everything about the fleet."""
        one, topology = self._coordinator, self._coordinator.topology
        reply = coordinator_pb2.FleetStatus(
            fleet=topology.fleet,
            term=topology.epoch.term,
            version=topology.epoch.version,
            ray_address=self._cluster.address,
            ray_problem=one.head_problem if self.in_charge else "not connected yet",
            dashboard_url=self._cluster.dashboard_url,
            pid=os.getpid(),
        )
        for name, wanted in one.numbers.items():
            ready = sum(
                replica.state is State.READY
                for pod, replica in one.replicas.items()
                if pod.rpartition("-")[0] == name
            )
            model = one.fleet.model_of(name).name
            reply.pools.add(pool=name, model=model, wanted=wanted, ready=ready)
        for pod in sorted(one.replicas.keys() | one.refused.keys()):
            self._describe(reply.pods.add(pod=pod), pod)
        return reply

    def _describe(self, status: coordinator_pb2.PodStatus, pod: str) -> None:
        one = self._coordinator.replicas.get(pod) or Replica(
            self._coordinator.refused[pod], answers=True
        )
        want = self._coordinator.wanted.get(pod)
        status.pool = pod.rpartition("-")[0]
        status.state = one.state
        status.address = one.published
        status.reason = one.problem
        if want is not None:
            status.model, status.role = want.model, want.role
        if (report := one.report) is not None:
            status.role = report.role
            status.reason = report.reason or one.problem
            status.host, status.pid = report.host, report.pid
            status.restarts, status.startup_s = report.restarts, report.startup_s
            status.resident_bytes, status.adopted = report.resident_bytes, report.adopted

    async def _require_charge(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not self.in_charge:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the coordinator is not connected to Ray yet"
            )
