"""Connections to other workers' services: one per address, kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from quire.cluster.rpc import Cluster
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_STATES = {
    grpc.ChannelConnectivity.READY: "ready",
    grpc.ChannelConnectivity.CONNECTING: "connecting",
    grpc.ChannelConnectivity.TRANSIENT_FAILURE: "failing",
}


class Peers:
    """Lives on the event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._channels: dict[str, grpc.aio.Channel] = {}

    def stub(self, address: str) -> WorkerAsyncStub:
        """The service at an address; connects with the first call."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._cluster.channel(address, OPTIONS)
        return WorkerStub(channel)

    def states(self) -> dict[str, str]:
        """Address -> ready, connecting, failing or idle."""
        return {a: _STATES.get(c.get_state(), "idle") for a, c in self._channels.items()}

    async def close(self) -> None:
        """Close every connection."""
        for channel in self._channels.values():
            await channel.close()
