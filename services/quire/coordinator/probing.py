"""Whether an engine lives: asked again and again, over gRPC."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc

from quire.proto import worker_pb2

if TYPE_CHECKING:
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

PROBE_S, PROBE_TIMEOUT_S = 0.5, 2.0
SILENCE_S, LOADING_SILENCE_S = 10.0, 60.0
"""For which an engine may leave probes unanswered once it was ready, and before: it answers while
it loads, but its imports, or a call of a library, may keep it from that."""


class Silence:
    """For how long an engine has answered nothing. No pause between two probes counts for more than
    a probe takes, so that nothing is blamed on it when this process itself was stopped."""

    def __init__(self) -> None:
        self.lasted_s = 0.0
        self._noted = time.monotonic()

    def note(self, *, answered: bool) -> None:
        """After each probe."""
        now = time.monotonic()
        passed_s = min(now - self._noted, PROBE_S + PROBE_TIMEOUT_S)
        self.lasted_s = 0.0 if answered else self.lasted_s + passed_s
        self._noted = now

    def is_too_long(self, was_ready: bool) -> bool:
        """It would not answer any more."""
        return self.lasted_s >= (SILENCE_S if was_ready else LOADING_SILENCE_S)


async def health(stub: WorkerAsyncStub) -> worker_pb2.HealthReport | None:
    """How an engine is, None when it does not answer."""
    try:
        reply = await stub.Control(
            worker_pb2.ControlRequest(health=worker_pb2.Health()), timeout=PROBE_TIMEOUT_S
        )
    except grpc.aio.AioRpcError:
        return None
    return reply.health
