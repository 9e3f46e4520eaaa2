"""Routers as the gateway asks them: one in this process, or others over gRPC.

A router over gRPC is believed to answer as long as its checks do. They are made beside the
requests, so that no request has to find out that a router is gone; one that does find out, between
two checks, waits for ROUTE_TIMEOUT_S and no longer.
"""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from quire.api.errors import ApiError
from quire.cluster.rpc import Cluster
from quire.proto import router_pb2
from quire.proto.router_pb2_grpc import RouterStub
from quire.router import convert
from quire.router.metrics import set_fleet_gauges
from quire.router.pods import watch_pods
from quire.router.router import Router

if TYPE_CHECKING:
    from quire.config.router import RouterConfig
    from quire.proto.router_pb2_grpc import RouterAsyncStub
    from quire.router.discovery import Discovery
    from quire.router.query import RouteQuery
    from quire.telemetry.instruments import Instruments

logger = logging.getLogger(__name__)

ROUTE_TIMEOUT_S = 0.25
CHECK_TIMEOUT_S = 1.0
CHECK_EVERY_S = 0.5
MAX_OBSERVATIONS = 1024
"""Waiting to be sent; more are dropped, they only sharpen estimates."""
CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # another replica is the retry
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)


class Silence(StrEnum):
    """Why a router gave no decision. Values are those of the metric's label."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    NO_POD = "no_pod"
    """It answers, but knows of no pod that may serve the request."""


class NoDecision(Exception):
    """A router chose no pod."""

    def __init__(self, why: Silence) -> None:
        super().__init__(why.value)
        self.why = why


class Replica(Protocol):
    """One router."""

    name: str
    is_up: bool
    """It is worth asking."""

    async def run(self) -> None:
        """Keep the connection, until cancelled."""

    async def route(self, query: RouteQuery) -> router_pb2.RouteReply:
        """Where the request goes. Raises NoDecision, in a bounded time."""

    def show(self) -> None:
        """Set gauges to what they are now, before a scrape."""

    def observe(self, decision_id: str, cached_tokens: int) -> None:
        """What the pod that computed the prompt had really cached. Never waits."""

    async def explain(self, decision_id: str) -> router_pb2.Explanation | None:
        """The scores, None when it does not answer or has forgotten."""


class OwnRouter:
    """A router in this process, which watches the workers by itself."""

    name = "own"
    is_up = True

    def __init__(
        self,
        config: RouterConfig,
        pods: Discovery,
        instruments: Instruments,
        cluster: Cluster | None = None,
    ) -> None:
        self.router = Router(config, instruments=instruments)
        self._pods, self._instruments, self._cluster = pods, instruments, cluster

    async def run(self) -> None:
        """Watch the workers."""
        fleet, clock = self.router.fleet, self.router.clock
        await watch_pods(self._pods, fleet, clock, self._instruments, self._cluster)

    async def route(self, query: RouteQuery) -> router_pb2.RouteReply:
        """Raises NoDecision while it knows no pod for the request."""
        try:
            return convert.reply_to(self.router.route(query))
        except ApiError:
            raise NoDecision(Silence.NO_POD) from None

    def show(self) -> None:
        """The pods and the index."""
        set_fleet_gauges(self._instruments, self.router.fleet, self.router.clock())

    def observe(self, decision_id: str, cached_tokens: int) -> None:
        """At once."""
        self.router.observe(decision_id, cached_tokens)

    async def explain(self, decision_id: str) -> router_pb2.Explanation | None:
        """None when it has forgotten."""
        found = self.router.explain(decision_id)
        return None if found is None else convert.explanation_to(found)


class RemoteRouter:
    """A router at a gRPC address. `run` must be running."""

    def __init__(self, address: str, cluster: Cluster | None = None) -> None:
        self.name = address
        self.is_up = False
        self._cluster = cluster or Cluster()
        self._stub: RouterAsyncStub | None = None
        self._observations: asyncio.Queue[router_pb2.ObserveRequest] = asyncio.Queue(
            MAX_OBSERVATIONS
        )

    async def run(self) -> None:
        """Check the router again and again, and tell it what was observed."""
        async with self._cluster.channel(self.name, CHANNEL_OPTIONS) as channel:
            self._stub = stub = RouterStub(channel)
            try:
                async with asyncio.TaskGroup() as jobs:
                    jobs.create_task(self._check(stub))
                    jobs.create_task(self._send_observations(stub))
            finally:
                self._stub, self.is_up = None, False

    async def route(self, query: RouteQuery) -> router_pb2.RouteReply:
        """Raises NoDecision after ROUTE_TIMEOUT_S at the latest."""
        if self._stub is None:
            raise NoDecision(Silence.UNREACHABLE)
        try:
            return await self._stub.Route(convert.query_to(query), timeout=ROUTE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            why = _SILENCES.get(error.code(), Silence.UNREACHABLE)
            if why is not Silence.NO_POD:
                self._set_up(False, error)
            raise NoDecision(why) from None

    def show(self) -> None:
        """Its own process shows what it knows."""

    def observe(self, decision_id: str, cached_tokens: int) -> None:
        """Queued; dropped when the router is too slow to hear."""
        if not self._observations.full():
            self._observations.put_nowait(
                router_pb2.ObserveRequest(decision_id=decision_id, cached_tokens=cached_tokens)
            )

    async def explain(self, decision_id: str) -> router_pb2.Explanation | None:
        """None when the router does not answer or has forgotten."""
        if self._stub is None:
            return None
        request = router_pb2.ExplainRequest(decision_id=decision_id)
        try:
            reply = await self._stub.Explain(request, timeout=ROUTE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        return reply.explanations[-1]

    # ----

    async def _check(self, stub: RouterAsyncStub) -> None:
        while True:
            try:
                reply = await stub.Check(router_pb2.CheckRequest(), timeout=CHECK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._set_up(False, error)
            else:
                self._set_up(reply.pods_serving > 0, "it knows no pod that serves")
            await asyncio.sleep(CHECK_EVERY_S)

    async def _send_observations(self, stub: RouterAsyncStub) -> None:
        while True:
            observation = await self._observations.get()
            try:
                await stub.Observe(observation, timeout=ROUTE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                logger.debug("router %s was not told what it missed: %s", self.name, error.code())

    def _set_up(self, is_up: bool, why: Any) -> None:
        if is_up == self.is_up:
            return
        self.is_up = is_up
        if is_up:
            logger.info("router %s is asked", self.name)
        else:
            reason = why.code().name if isinstance(why, grpc.aio.AioRpcError) else why
            logger.warning("router %s is not asked any more: %s", self.name, reason)


_SILENCES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: Silence.TIMEOUT,
    grpc.StatusCode.FAILED_PRECONDITION: Silence.NO_POD,
}
