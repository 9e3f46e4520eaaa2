"""What the gateway needs of a worker, whoever implements it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from quire.api.errors import ApiError
from quire.proto import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

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


class Loss(StrEnum):
    """Why a request cannot go on where it is. Values are those of the metric's label."""

    LOST = "lost"
    """The connection ended, however orderly it looked."""
    SILENT = "silent"
    """Nothing was heard of the worker for too long."""
    HUNG = "hung"
    """The worker answers, but its engine finishes no step."""
    DRAINING = "draining"
    NOT_READY = "not_ready"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"
    """The engine failed, or failed this request."""
    GAP = "gap"
    """Tokens are missing before those that came."""
    ABORTED = "aborted"
    """The worker ended a choice that nobody here wanted ended."""


LOSSES = {
    _FAILURE.CODE_NOT_READY: Loss.NOT_READY,
    _FAILURE.CODE_OVERLOADED: Loss.OVERLOADED,
    _FAILURE.CODE_INTERNAL: Loss.INTERNAL,
}
"""Failures after which another worker, or the same one later, may do better."""


class Receiver(Protocol):
    """Who gets what a worker says about one request. After `refuse` or `lose` nothing follows."""

    def deliver(self, output: worker_pb2.ChoiceOutput) -> None:
        """New tokens, or the end, of a choice."""

    def refuse(self, failure: worker_pb2.Failure) -> None:
        """The worker will not go on; it holds nothing of the request."""

    def lose(self, loss: Loss) -> None:
        """The worker is no longer to be relied on."""


class Worker(Protocol):
    """One engine pod. Everything happens on one event loop; only `run` and metrics wait."""

    name: str
    """Distinct among the gateway's workers."""
    on_change: Callable[[], None]
    """Called when the worker becomes ready, is ready no more, or drains."""

    @property
    def address(self) -> str:
        """gRPC address under which other workers reach it."""

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

    @property
    def num_open(self) -> int:
        """Requests that this gateway has there."""

    async def run(self) -> None:
        """Keep the connection until cancelled."""

    def submit(self, submit: worker_pb2.Submit, receiver: Receiver) -> None:
        """Send a request; sets its `request` number. The worker must be ready."""

    def abort(self, number: int, choice: int | None = None) -> None:
        """End request `number`, or one choice of it. One that has ended is ignored."""

    def release(self, loss: Loss) -> None:
        """Take every request away from the worker, and tell their receivers why."""

    async def control(
        self, request: worker_pb2.ControlRequest, timeout_s: float
    ) -> worker_pb2.ControlReply:
        """What the worker says to a command; not ok, with the reason, when it says nothing."""

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
