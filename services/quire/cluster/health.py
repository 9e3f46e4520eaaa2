"""The standard health service, `grpc.health.v1`, for probes of Kubernetes and load balancers.

service                       serving while
"", "liveness"                only a restart would help otherwise
"readiness", the gRPC service   requests are taken
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Context = grpc.aio.ServicerContext[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ]

WATCH_S = 0.5
_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers from two questions to the process, whose gRPC service is `name`."""

    def __init__(
        self, name: str, is_live: Callable[[], bool], is_ready: Callable[[], bool]
    ) -> None:
        self._services = {
            "": is_live,
            "liveness": is_live,
            "readiness": is_ready,
            name: is_ready,
        }
        self._over = asyncio.Event()

    def end(self) -> None:
        """The server stops next: end the streams, or it cuts them off and logs them as failed."""
        self._over.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """One probe. NOT_FOUND for a service that is not listed."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Status(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and each time it changes, until `end`."""
        shown = None
        while not self._over.is_set():
            status = self._status(request.service)
            if status != shown:
                shown = status
                yield _Status(status=status)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._over.wait()

    def _status(self, service: str) -> int:
        is_fine = self._services.get(service)
        if is_fine is None:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if is_fine() else _Status.NOT_SERVING)
