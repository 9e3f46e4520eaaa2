"""One worker over gRPC: start-up and load by Watch, all requests over one Session.

    run:   connect -> Watch: phases ... model -> Session up = ready -> (any stream ends) -> back off
    submit -> outbox -> Session stream -> TokenBatch / Failure -> Receiver

A stream's end is a loss, however orderly it looks: a killed peer can look like one. So is silence,
because gRPC does not notice a peer that is stopped or cut off. An engine that finishes no step
while its process answers is hung: its requests are taken away, and it is ready again when it moves.
Every call is cancelled when left, because a dropped grpc.aio call never ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc

from quire.cluster.rpc import Cluster
from quire.gateway.worker import Loss
from quire.proto import common_pb2, worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quire.gateway.worker import Receiver
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
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
    """A stream of the worker ended, or the worker fell silent."""


@dataclass(frozen=True)
class Vigilance:
    """When a worker is no longer to be relied on."""

    silence_s: float = 3.0
    """Without any frame of Watch, which reports the load once a second."""
    step_age_s: float = 30.0
    """Without a finished step of the engine while it has work."""


BEATS = 4
"""Looks per `silence_s`. Counting them, not the time: when this process itself was stopped, nothing
was heard because nobody listened."""


@dataclass(slots=True)
class _Pending:
    """A submitted request: whose it is, and how many choices are still open."""

    receiver: Receiver
    open_choices: int


class WorkerClient:
    """The worker at `address` (host:port or unix:/path). `run` must be running."""

    def __init__(
        self,
        address: str,
        vigilance: Vigilance,
        *,
        name: str = "0",
        cluster: Cluster | None = None,
    ) -> None:
        self.name = name
        self.on_change: Callable[[], None] = lambda: None
        self._dialed = address
        self._cluster = cluster or Cluster()
        self._vigilance = vigilance
        self._pending: dict[int, _Pending] = {}
        self._next_number = 1
        self._outbox: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._stub: WorkerAsyncStub | None = None
        self._is_connected = False
        self._num_frames = 0
        self.model: worker_pb2.ModelInfo | None = None
        self.startup = worker_pb2.Startup(phase="connect")
        self.load = worker_pb2.Load()

    @property
    def address(self) -> str:
        """Where other workers reach it: what it says itself, once it has."""
        return (self.model.address if self.model is not None else "") or self._dialed

    @property
    def ready(self) -> bool:
        """Requests can be submitted now."""
        return self._is_connected and not self.load.draining and not self._is_hung

    @property
    def num_open(self) -> int:
        """Requests that this gateway has there."""
        return len(self._pending)

    @property
    def _is_hung(self) -> bool:
        return self.load.step_age_s > self._vigilance.step_age_s

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        backoff = MIN_BACKOFF_S
        while True:
            was_connected = await self._connect()
            backoff = MIN_BACKOFF_S if was_connected else min(2 * backoff, MAX_BACKOFF_S)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    def submit(self, submit: worker_pb2.Submit, receiver: Receiver) -> None:
        """Send a request; sets its `request` number. The worker must be ready."""
        submit.request = self._next_number
        self._next_number += 1
        open_choices = len(submit.resumed) or max(submit.sampling.n, 1)
        self._pending[submit.request] = _Pending(receiver, open_choices)
        self._outbox.put_nowait(worker_pb2.SessionRequest(submit=submit))

    def abort(self, number: int, choice: int | None = None) -> None:
        """End request `number`, or one choice of it. One that has ended is ignored."""
        if number not in self._pending:
            return
        abort = worker_pb2.Abort(request=number)
        if choice is None:
            del self._pending[number]
        else:
            abort.choice = choice
        self._outbox.put_nowait(worker_pb2.SessionRequest(abort=abort))

    def release(self, loss: Loss) -> None:
        """Take every request away from the worker, and tell their receivers why."""
        released, self._pending = self._pending, {}
        for number in released:
            abort = worker_pb2.Abort(request=number, moved=loss is Loss.DRAINING)
            # in vain when the connection is gone
            self._outbox.put_nowait(worker_pb2.SessionRequest(abort=abort))
        for pending in released.values():
            pending.receiver.lose(loss)

    async def control(
        self, request: worker_pb2.ControlRequest, timeout_s: float
    ) -> worker_pb2.ControlReply:
        """What the worker says to a command; not ok, with the reason, when it says nothing."""
        if self._stub is None:
            return worker_pb2.ControlReply(message="it is not connected")
        try:
            return await self._stub.Control(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return worker_pb2.ControlReply(message=error.details() or error.code().name)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return worker_pb2.ControlReply(message="the connection was closed meanwhile")

    async def collect_metrics(self) -> str:
        """The worker's Prometheus page, empty when it cannot be had."""
        request = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())
        reply = await self.control(request, METRICS_TIMEOUT_S)
        if not reply.ok:
            logger.info("no metrics from worker %s: %s", self.name, reply.message)
        return reply.metrics

    # ---- connection

    async def _connect(self) -> bool:
        """One connection, from start to loss; whether requests could be submitted over it."""
        loss = Loss.LOST
        async with self._cluster.channel(self._dialed, CHANNEL_OPTIONS) as channel:
            self._stub = WorkerStub(channel)
            try:
                async with asyncio.TaskGroup() as streams:
                    await self._watch(self._stub, streams)
            except* (grpc.aio.AioRpcError, _Lost) as group:
                logger.debug("worker %s at %s: %s", self.name, self._dialed, group.exceptions)
                if any(isinstance(e, _Lost) and e.args for e in group.exceptions):
                    loss = Loss.SILENT
            self._stub = None
            was_connected, self._is_connected = self._is_connected, False
            if was_connected:  # before the channel is closed, which may take its time
                self.startup = worker_pb2.Startup(phase="connect")
                self.load = worker_pb2.Load()
                logger.warning("worker %s at %s is gone (%s)", self.name, self._dialed, loss)
                self.on_change()
                self.release(loss)
        return was_connected

    async def _watch(self, stub: WorkerAsyncStub, streams: asyncio.TaskGroup) -> None:
        with _cancelling(stub.Watch(worker_pb2.WatchRequest())) as call:
            while isinstance(update := await call.read(), worker_pb2.WorkerUpdate):
                self._num_frames += 1
                kind = update.WhichOneof("update")
                if kind == "startup":
                    self.startup = update.startup
                elif kind == "load":
                    self._take_load(update.load)
                elif kind == "model":
                    self._open_session(stub, streams, update.model)
        raise _Lost

    def _take_load(self, load: worker_pb2.Load) -> None:
        was_ready = self.ready
        self.load = load
        if self._is_hung and self._pending:
            logger.warning("worker %s finished no step for %.0f s", self.name, load.step_age_s)
            self.release(Loss.HUNG)
        if self.ready != was_ready:
            self.on_change()

    def _open_session(
        self, stub: WorkerAsyncStub, streams: asyncio.TaskGroup, model: worker_pb2.ModelInfo
    ) -> None:
        self.model = model
        self._outbox = asyncio.Queue()
        streams.create_task(self._session(stub, self._outbox))
        streams.create_task(self._listen())
        self._is_connected = True
        self.startup = worker_pb2.Startup(phase="ready")
        logger.info("worker %s at %s serves %s", self.name, self._dialed, model.model)
        self.on_change()

    async def _listen(self) -> None:
        """Raises _Lost when nothing was heard for too long."""
        missed, heard = 0, self._num_frames
        while missed < BEATS:
            await asyncio.sleep(self._vigilance.silence_s / BEATS)
            missed = missed + 1 if heard == self._num_frames else 0
            heard = self._num_frames
        raise _Lost(f"silent for {self._vigilance.silence_s:g} s")

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
                pending.receiver.refuse(reply.failure)
            return
        for output in reply.batch.outputs:
            pending = self._pending.get(output.request)
            if pending is None:  # aborted; the worker did not know yet
                continue
            if output.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                pending.open_choices -= 1
                if pending.open_choices <= 0:
                    del self._pending[output.request]
            pending.receiver.deliver(output)


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
