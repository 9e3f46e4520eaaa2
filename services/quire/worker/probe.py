"""Measures the way from this worker to another, when it is asked to: one peer at a time."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from quire.proto import worker_pb2
from quire.transfer.endpoint import PROBE_BYTES
from quire.transfer.link import LinkRefused
from quire.transfer.negotiate import Peer

if TYPE_CHECKING:
    from quire.transfer.endpoint import Endpoint

logger = logging.getLogger(__name__)

MAX_TRANSPORTS = 8


class Prober:
    """Lives on the event loop."""

    def __init__(self, endpoint: Endpoint, transports: tuple[str, ...]) -> None:
        self._endpoint = endpoint
        self._transports = transports
        self._is_probing = False

    async def run(self, probe: worker_pb2.Probe) -> worker_pb2.ControlReply:
        """Each transport after the other: at once they would take each other's bandwidth.

        Raises ValueError on a peer that cannot be, or too many transports.
        """
        peer = Peer.from_proto(probe.peer)
        names = tuple(probe.transports) or self._transports
        if len(names) > MAX_TRANSPORTS or not peer.listeners:
            raise ValueError(f"a probe names a peer's listeners, and up to {MAX_TRANSPORTS} ways")
        if self._is_probing:
            return worker_pb2.ControlReply(ok=False, message="another probe is running")
        self._is_probing = True
        try:
            results = [await self._measure(peer, name, probe.bytes) for name in names]
        finally:
            self._is_probing = False
        return worker_pb2.ControlReply(ok=True, probes=results)

    async def _measure(self, peer: Peer, name: str, num_bytes: int) -> worker_pb2.ProbeResult:
        result = worker_pb2.ProbeResult(transport=name)
        try:
            measured = await asyncio.wrap_future(
                self._endpoint.probe(peer, name, num_bytes or PROBE_BYTES)
            )
        except LinkRefused as refusal:
            result.failure, result.detail = refusal.failure, refusal.detail
        else:
            result.bytes_per_s = measured.bytes_per_s
            result.latency_p50_s = measured.latency_p50_s
            result.latency_p99_s = measured.latency_p99_s
            logger.info("%s to %s: %.2f GB/s", name, peer.worker, measured.bytes_per_s / 1e9)
        return result
