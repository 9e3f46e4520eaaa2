"""What the gateway needs of a worker, whoever implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quire.api.errors import ApiError
from quire.proto import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.gateway.replies import Replies

_FAILURE = worker_pb2.Failure
_CODES = {
    _FAILURE.CODE_INVALID: "invalid_value",
    _FAILURE.CODE_OVERLOADED: "overloaded",
    _FAILURE.CODE_DEADLINE: "deadline_exceeded",
    _FAILURE.CODE_NOT_READY: "not_ready",
    _FAILURE.CODE_INTERNAL: "internal_error",
}
_RETRY_AFTER_S = {"overloaded": 1.0, "not_ready": 2.0}
"""When the worker does not say."""


class Worker(Protocol):
    """One engine pod. Nothing here raises when the pod is away: `submit` says so in its reply."""

    @property
    def model(self) -> worker_pb2.ModelInfo | None:
        """The loaded model, None before it is loaded."""

    @property
    def ready(self) -> bool:
        """Requests can be submitted now."""

    @property
    def startup(self) -> worker_pb2.Startup:
        """The latest start-up phase."""

    @property
    def load(self) -> worker_pb2.Load:
        """The latest load report."""

    async def run(self) -> None:
        """Keep the connection until cancelled."""

    async def wait_ready(self) -> worker_pb2.ModelInfo:
        """The loaded model, once requests can be submitted."""

    async def wait_lost(self) -> None:
        """Return when a ready worker is ready no more."""

    def submit(self, submits: Sequence[worker_pb2.Submit]) -> Replies:
        """Send requests whose answers are read together; sets their `request` numbers."""

    async def collect_metrics(self) -> str:
        """The worker's Prometheus page, empty when it cannot be had."""


def worker_lost() -> ApiError:
    """The connection to the worker broke."""
    return ApiError("worker_lost", "The worker serving this request was lost.", retry_after_s=1.0)


def failure_error(failure: worker_pb2.Failure) -> ApiError:
    """A worker's refusal in the caller's terms."""
    code = _CODES.get(failure.code, "internal_error")
    if code == "internal_error":  # the reason is ours to know; it is in the worker's log
        return ApiError(code, "The server had an error while processing the request.")
    retry_after_s = failure.retry_after_ms / 1000 or _RETRY_AFTER_S.get(code)
    return ApiError(code, failure.message, retry_after_s=retry_after_s)
