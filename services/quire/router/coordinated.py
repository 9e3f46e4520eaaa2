"""Pods that a coordinator tells of. While it is away, those that were there last stay."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING

import grpc

from quire.proto import coordinator_pb2
from quire.proto.coordinator_pb2_grpc import CoordinatorStub
from quire.router.discovery import StaticPods
from quire.router.endpoint_slices import EndpointSlices, own_namespace

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from quire.cluster.rpc import Cluster
    from quire.config.discovery import DiscoveryConfig
    from quire.proto.coordinator_pb2_grpc import CoordinatorAsyncStub
    from quire.router.discovery import Discovery

logger = logging.getLogger(__name__)

SILENCE_S = 7.0
"""Without a topology, one is due every 2 s, the call is made anew."""
FOLLOW_S = 30.0
"""Then the address is looked up anew: a name may have moved to another coordinator."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 2.0
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # two readers in one process must not share, and lose, one connection
    ("grpc.use_local_subchannel_pool", 1),
)


def discover(config: DiscoveryConfig, pods: Mapping[str, str], cluster: Cluster) -> Discovery:
    """Pods named by name and address, and those of a coordinator or of Services if given.

    Raises OSError when Services are given outside of Kubernetes.
    """
    if config.kubernetes_service:
        return EndpointSlices(config.kubernetes_service, pods, own_namespace())
    if config.coordinator is None:
        return StaticPods(pods)
    return CoordinatedPods(config.coordinator, config.fleet_model or "", pods, cluster)


class Seen:
    """The latest topology, which an older one of the same fleet cannot replace."""

    def __init__(self) -> None:
        self.fleet = ""
        self.epoch = (0, 0)
        """(term, version)."""

    def accepts(self, topology: coordinator_pb2.Topology) -> bool:
        """True when it is news. An older one is of a coordinator that another took over from; of
        another fleet, the address leads there now."""
        epoch = (topology.term, topology.version)
        if topology.fleet != self.fleet:
            self.fleet, self.epoch = topology.fleet, epoch
            return True
        if epoch < self.epoch:
            logger.warning(
                "a topology of epoch %d.%d is refused after %d.%d: end the coordinator that says "
                "it, another one has taken over",
                *epoch,
                *self.epoch,
            )
            return False
        is_new = epoch > self.epoch
        self.epoch = epoch
        return is_new


class CoordinatedPods:
    """Implements `Discovery`, with the pods in `beside` always among them."""

    def __init__(
        self, address: str, model: str, beside: Mapping[str, str], cluster: Cluster
    ) -> None:
        self._address, self._model = address, model
        self._beside, self._cluster = dict(beside), cluster

    async def watch(self) -> AsyncIterator[Mapping[str, str]]:
        """All pods now and after each change; does not end by itself."""
        seen, backoff = Seen(), MIN_BACKOFF_S
        if self._beside:
            yield self._beside
        while True:
            try:
                async with contextlib.aclosing(self._follow()) as topologies:
                    async for topology in topologies:
                        backoff = MIN_BACKOFF_S
                        if seen.accepts(topology):
                            yield self._beside | {pod.name: pod.address for pod in topology.pods}
            except grpc.aio.AioRpcError as error:
                self._note(error)
            except TimeoutError:
                logger.debug("the coordinator at %s is silent", self._address)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _follow(self) -> AsyncGenerator[coordinator_pb2.Topology]:
        """What one coordinator says, for a while. Raises TimeoutError and AioRpcError."""
        until = time.monotonic() + FOLLOW_S
        async with self._cluster.channel(self._address, CHANNEL_OPTIONS) as channel:
            stub: CoordinatorAsyncStub = CoordinatorStub(channel)
            call = stub.Watch(coordinator_pb2.TopologyRequest(model=self._model))
            try:
                while time.monotonic() < until:
                    async with asyncio.timeout(SILENCE_S):
                        topology = await call.read()
                    if not isinstance(topology, coordinator_pb2.Topology):
                        return  # end of stream
                    yield topology
            finally:
                call.cancel()

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        known = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED)
        if error.code() in known:
            logger.error("the coordinator at %s refuses: %s", self._address, error.details())
        else:
            logger.debug("no coordinator at %s: %s", self._address, error.details())
