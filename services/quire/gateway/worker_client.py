"""One worker over gRPC: start-up and load by Watch, all requests over one Session.

    run:   connect -> Watch: phases ... model -> Session up = ready -> (any stream ends) -> back off
    submit -> outbox -> Session stream -> TokenBatch / Failure -> Replies

A stream's end is a loss, however orderly it looks: a killed peer can look like one. Every call is
cancelled when left, because a dropped grpc.aio call never ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc

from quire.api.errors import ApiError
from quire.gateway.replies import Replies
from quire.gateway.worker import failure_error, worker_lost
from quire.proto import common_pb2, worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
WATCH_TIMEOUT_S = 30.0
"""A ready worker reports its load once a second; after this much silence it counts as lost."""
METRICS_TIMEOUT_S = 2.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # reconnecting is done here, with our own back-off
    ("grpc.enable_retries", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # two gateways in one process must not share, and lose, one connection
    ("grpc.use_local_subchannel_pool", 1),
)


C = TypeVar("C", bound=grpc.aio.Call)


class _Lost(Exception):
    """A stream of the worker ended."""


@dataclass(slots=True)
class _Pending:
    """A submitted request: whose it is, and how many choices are still open."""

    replies: Replies
    index: int
    open_choices: int


class WorkerClient:
    """The worker at `address` (host:port or unix:/path). `run` must be running."""

    def __init__(self, address: str, *, max_backlog: int) -> None:
        self._address = address
        self._max_backlog = max_backlog
        self._pending: dict[int, _Pending] = {}
        self._next_number = 1
        self._outbox: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._stub: WorkerAsyncStub | None = None
        self._changed = asyncio.Condition()
        self.model: worker_pb2.ModelInfo | None = None
        self.ready = False
        self.startup = worker_pb2.Startup(phase="connect")
        self.load = worker_pb2.Load()

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        backoff = MIN_BACKOFF_S
        while True:
            with contextlib.suppress(_Lost):
                await self._connect()
            was_ready, self.ready = self.ready, False
            self._stub = None
            self._lose_pending()
            if was_ready:
                async with self._changed:
                    self._changed.notify_all()
                logger.warning("lost the worker at %s", self._address)
                self.startup = worker_pb2.Startup(phase="connect")
            backoff = MIN_BACKOFF_S if was_ready else min(2 * backoff, MAX_BACKOFF_S)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    async def wait_ready(self) -> worker_pb2.ModelInfo:
        """The loaded model, once requests can be submitted."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ready)
        if self.model is None:
            raise AssertionError("ready without a model")
        return self.model

    async def wait_lost(self) -> None:
        """Return when a ready worker is ready no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.ready)

    def submit(self, submits: Sequence[worker_pb2.Submit]) -> Replies:
        """Send requests whose answers are read together; sets their `request` numbers."""
        first = self._next_number
        self._next_number += len(submits)
        num_choices = sum(max(submit.sampling.n, 1) for submit in submits)
        max_backlog = self._max_backlog * num_choices
        replies = Replies(len(submits), max_backlog, lambda i: self._abort(first + i))
        if not self.ready:
            replies.fail(ApiError("not_ready", "The model is not ready.", retry_after_s=2.0))
            return replies
        for index, submit in enumerate(submits):
            submit.request = first + index
            self._pending[submit.request] = _Pending(replies, index, max(submit.sampling.n, 1))
            self._outbox.put_nowait(worker_pb2.SessionRequest(submit=submit))
        return replies

    async def collect_metrics(self) -> str:
        """The worker's Prometheus page, empty when it cannot be had."""
        if self._stub is None:
            return ""
        request = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())
        try:
            reply = await self._stub.Control(request, timeout=METRICS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("no metrics from the worker: %s", error.code().name)
            return ""
        return reply.metrics

    # ---- connection

    async def _connect(self) -> None:
        """One connection, from start to loss. Always raises _Lost or CancelledError."""
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            self._stub = WorkerStub(channel)
            try:
                async with asyncio.TaskGroup() as streams:
                    await self._watch(self._stub, streams)
            except* (grpc.aio.AioRpcError, _Lost, TimeoutError) as group:
                logger.debug("worker at %s: %s", self._address, group.exceptions)
        raise _Lost

    async def _watch(self, stub: WorkerAsyncStub, streams: asyncio.TaskGroup) -> None:
        with _cancelling(stub.Watch(worker_pb2.WatchRequest())) as call:
            while True:
                async with asyncio.timeout(WATCH_TIMEOUT_S if self.ready else None):
                    update = await call.read()
                if not isinstance(update, worker_pb2.WorkerUpdate):  # end of stream
                    raise _Lost
                kind = update.WhichOneof("update")
                if kind == "startup":
                    self.startup = update.startup
                elif kind == "load":
                    self.load = update.load
                elif kind == "model":
                    await self._open_session(stub, streams, update.model)

    async def _open_session(
        self, stub: WorkerAsyncStub, streams: asyncio.TaskGroup, model: worker_pb2.ModelInfo
    ) -> None:
        self.model = model
        self._outbox = asyncio.Queue()
        streams.create_task(self._session(stub, self._outbox))
        self.ready = True
        self.startup = worker_pb2.Startup(phase="ready")
        logger.info("worker at %s serves %s", self._address, model.model)
        async with self._changed:
            self._changed.notify_all()

    async def _session(
        self, stub: WorkerAsyncStub, outbox: asyncio.Queue[worker_pb2.SessionRequest]
    ) -> None:
        with _cancelling(stub.Session()) as call:
            writer = asyncio.create_task(_write(call, outbox))
            try:
                while isinstance(reply := await call.read(), worker_pb2.SessionReply):
                    self._take(reply)
            finally:
                writer.cancel()
        raise _Lost

    # ---- requests

    def _take(self, reply: worker_pb2.SessionReply) -> None:
        if reply.HasField("failure"):
            pending = self._pending.pop(reply.failure.request, None)
            if pending is not None:
                pending.replies.finish(pending.index)
                pending.replies.fail(failure_error(reply.failure))
            return
        for output in reply.batch.outputs:
            pending = self._pending.get(output.request)
            if pending is None:  # aborted; the worker did not know yet
                continue
            if output.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                pending.open_choices -= 1
                if pending.open_choices <= 0:
                    del self._pending[output.request]
                    pending.replies.finish(pending.index)
            pending.replies.deliver(pending.index, output)

    def _abort(self, number: int) -> None:
        if self._pending.pop(number, None) is not None:
            abort = worker_pb2.SessionRequest(abort=worker_pb2.Abort(request=number))
            self._outbox.put_nowait(abort)

    def _lose_pending(self) -> None:
        lost, self._pending = self._pending, {}
        for pending in lost.values():
            pending.replies.finish(pending.index)
            pending.replies.fail(worker_lost())


async def _write(
    call: grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionReply],
    outbox: asyncio.Queue[worker_pb2.SessionRequest],
) -> None:
    # a broken stream is the reader's to report
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outbox.get())


@contextlib.contextmanager
def _cancelling(call: C) -> Iterator[C]:
    try:
        yield call
    finally:
        call.cancel()
