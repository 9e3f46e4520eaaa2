"""Asks a process over the standard health service whether it lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.config.cluster import ClusterConfig

if TYPE_CHECKING:
    import grpc

TIMEOUT_S = 2.0


@dataclass
class Probe:
    """A question that can be asked again and again; the connection is kept."""

    address: str
    """gRPC address."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    _channel: grpc.aio.Channel | None = None

    async def __call__(self) -> bool:
        """Whether it answers in time, and does not say that only a restart helps."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from quire.cluster.rpc import Cluster

        if self._channel is None:
            options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_retries", 0)]
            self._channel = Cluster(self.cluster).channel(self.address, options)
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Let go of the connection; the next question makes another."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
