"""The Worker service over an engine loop.

Life of a request here:

    Session: Submit -> EngineLoop.submit -> (engine thread) add_request
             engine thread: step -> Sink.on_step -> event loop: Session.deliver -> TokenBatch
    it ends with a finish_reason per choice, with a Failure, by Abort, or with its session

However a session ends, every request of it is aborted: a killed gateway can look like one that
closed its stream in an orderly way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

import grpc

from quire.api.errors import ApiError
from quire.engine.loop import EngineLoop
from quire.engine.request import FinishReason
from quire.proto import worker_pb2, worker_pb2_grpc
from quire.telemetry.instruments import render
from quire.transfer.state import new_number
from quire.worker import convert
from quire.worker.cache_feed import CacheFeed
from quire.worker.disaggregation import Disaggregation, is_export
from quire.worker.session import GatewaySession, SlowGateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client.registry import CollectorRegistry

    from quire.engine.engine import Engine
    from quire.engine.loop import StepRecord
    from quire.engine.output import ChoiceOutput
    from quire.engine.request import EngineRequest
    from quire.engine.runner.load import Startup
    from quire.engine.scheduler.remote import BlocksReady, PrefillNeeded
    from quire.worker.disaggregation import TransferOptions
    from quire.worker.metrics import EngineMetrics

logger = logging.getLogger(__name__)

WATCH_STARTUP_S = 0.1
WATCH_LOAD_S = 1.0
WATCH_EVENTS_S = 0.05


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves from the start: until the engine is attached, requests are told to come later."""

    def __init__(self, metrics: EngineMetrics, registry: CollectorRegistry) -> None:
        self.incarnation = new_number()
        self.died = asyncio.Event()
        """Set when the engine has failed; every request has been told."""
        self.address = ""
        """Under which others reach this worker, as they are told."""
        self._metrics = metrics
        self._registry = registry
        self._asyncio = asyncio.get_running_loop()
        self._startup = worker_pb2.Startup(phase="start")
        self._loop: EngineLoop | None = None
        self._sessions: dict[int, GatewaySession] = {}
        self._disaggregation: Disaggregation | None = None

    # ---- start-up

    def report(self, startup: Startup) -> None:
        """Loading went on. Any thread."""
        self._startup = convert.startup_to(startup)

    def attach(self, engine: Engine, transfer: TransferOptions | None) -> EngineLoop:
        """The engine is loaded: serve with it, and exchange KV blocks if asked to.

        Raises OSError when a port for KV blocks is taken, ValueError when the engine has no pool in
        host memory.
        """
        loop = EngineLoop(engine, self)
        if transfer is not None:
            self._disaggregation = Disaggregation.start(loop, transfer, self.incarnation)
        self._loop = loop
        loop.start()
        return loop

    @property
    def ready(self) -> bool:
        """The engine is loaded and lives."""
        return self._loop is not None

    def metrics_page(self) -> str:
        """The engine's metrics in Prometheus' text format."""
        if (loop := self._loop) is not None:
            self._metrics.state(loop.state, loop.stalled_s())
        return render(self._registry)

    async def detach(self) -> None:
        """The engine stops: end what is exchanged with other workers."""
        if self._disaggregation is not None:
            await self._disaggregation.close()

    # ---- Sink: called on the engine thread

    def on_added(self, request: EngineRequest) -> None:
        """A request was queued."""
        self._metrics.added(request)

    def on_step(self, record: StepRecord, outputs: list[ChoiceOutput]) -> None:
        """A step finished."""
        self._metrics.step(record, outputs)
        if outputs:
            self._asyncio.call_soon_threadsafe(self._deliver, record.step, outputs)

    def on_prefill_needed(self, needed: list[PrefillNeeded]) -> None:
        """Prompts wait for another worker."""
        if self._disaggregation is not None:
            self._asyncio.call_soon_threadsafe(self._disaggregation.prefill_needed, needed)

    def on_blocks_ready(self, ready: list[BlocksReady]) -> None:
        """Blocks for another worker are computed."""
        if self._disaggregation is not None:
            self._asyncio.call_soon_threadsafe(self._disaggregation.blocks_ready, ready)

    def on_rejected(self, request_id: str, error: ApiError) -> None:
        """A request was refused."""
        self._metrics.rejected(error)
        self._asyncio.call_soon_threadsafe(self._reject, request_id, error)

    def on_death(self, error: BaseException) -> None:
        """The engine failed."""
        self._asyncio.call_soon_threadsafe(self.fail_all, f"the engine failed: {error}")

    # ---- on the event loop

    def _deliver(self, step: int, outputs: list[ChoiceOutput]) -> None:
        by_session: defaultdict[int, list[ChoiceOutput]] = defaultdict(list)
        for output in outputs:
            if is_export(output.request_id):
                if self._disaggregation is not None:
                    self._disaggregation.prefill.on_output(output)
            elif output.finish_reason is FinishReason.ERROR:
                message = "The model gave no finite number for this request."
                self._reject(output.request_id, ApiError("internal_error", message))
            else:
                by_session[_session_number(output.request_id)].append(output)
        for number, share in by_session.items():
            if (session := self._sessions.get(number)) is not None:
                session.deliver(step, share)

    def _reject(self, request_id: str, error: ApiError) -> None:
        if is_export(request_id):
            if self._disaggregation is not None:
                self._disaggregation.prefill.on_rejected(request_id, error)
            return
        session = self._sessions.get(_session_number(request_id))
        if session is not None and request_id in session.requests:
            request, attempt = session.requests.pop(request_id)
            session.fail(convert.failure_to(error, request, attempt))

    def fail_all(self, message: str) -> None:
        """The engine is lost: tell every request and refuse new ones."""
        self._loop = None
        for session in self._sessions.values():
            for request_id in list(session.requests):
                self._reject(request_id, ApiError("internal_error", message))
            session.close()
        self.died.set()

    # ---- Session

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionReply],
    ) -> AsyncIterator[worker_pb2.SessionReply]:
        """All requests of one gateway."""
        session = GatewaySession()
        self._sessions[session.number] = session
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            async for reply in session.replies():
                yield reply
        except SlowGateway:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway reads too slowly")
        finally:
            reader.cancel()
            del self._sessions[session.number]
            if self._loop is not None:
                for request_id in session.requests:
                    self._loop.abort(request_id)

    async def _read(
        self, session: GatewaySession, requests: AsyncIterator[worker_pb2.SessionRequest]
    ) -> None:
        """Take in the gateway's messages; its end, orderly or not, ends the session."""
        try:
            async for message in requests:
                if message.WhichOneof("message") == "submit":
                    self._submit(session, message.submit)
                elif (request_id := session.engine_id(message.abort.request)) is not None:
                    choice = message.abort.choice if message.abort.HasField("choice") else None
                    self._abort(request_id, choice)
        finally:
            session.close()

    def _submit(self, session: GatewaySession, submit: worker_pb2.Submit) -> None:
        request_id = session.open(submit)
        if self._loop is None:
            message = "The model is loading. Please retry."
            self._reject(request_id, ApiError("not_ready", message, retry_after_s=2))
            return
        try:
            request = convert.request_from(submit, request_id)
        except ApiError as error:
            self._reject(request_id, error)
        else:
            if self._disaggregation is not None:
                request = self._disaggregation.with_remote_prompt(request, submit)
            self._loop.submit(request)

    def _abort(self, request_id: str, choice: int | None) -> None:
        if self._loop is not None:
            self._loop.abort(request_id, choice)

    # ---- Prefill

    async def Prefill(
        self,
        request: worker_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillReply],
    ) -> AsyncIterator[worker_pb2.PrefillReply]:
        """Compute a prompt for another worker."""
        if self._disaggregation is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker exchanges no KV blocks")
        else:
            async for reply in self._disaggregation.prefill.serve(request):
                yield reply

    # ---- Watch

    async def Watch(
        self,
        request: worker_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchRequest, worker_pb2.WorkerUpdate],
    ) -> AsyncIterator[worker_pb2.WorkerUpdate]:
        """Start-up phases, the model, then load and cache events."""
        shown = None
        while (loop := self._loop) is None:
            if shown != self._startup:
                shown = self._startup
                yield worker_pb2.WorkerUpdate(startup=shown)
            await asyncio.sleep(WATCH_STARTUP_S)
        model = convert.model_info(loop.engine, self.incarnation)
        model.address = self.address
        yield worker_pb2.WorkerUpdate(model=model)
        feed = CacheFeed(self.incarnation, request) if request.cache_events else None
        period = WATCH_LOAD_S if feed is None else WATCH_EVENTS_S
        next_load = 0.0
        while self._loop is not None:
            now = self._asyncio.time()
            if now >= next_load:
                next_load = now + WATCH_LOAD_S
                yield worker_pb2.WorkerUpdate(load=self._load(loop))
            if feed is not None:
                for update in await feed.updates(loop):
                    yield update
            await asyncio.sleep(period)

    def _load(self, loop: EngineLoop) -> worker_pb2.Load:
        load = convert.load_to(loop.state, loop.stalled_s())
        if self._disaggregation is not None:
            load.prefill_weight = self._disaggregation.role.prefill_weight
            load.decode_weight = self._disaggregation.role.decode_weight
        return load

    # ---- Control

    async def Control(
        self,
        request: worker_pb2.ControlRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ControlRequest, worker_pb2.ControlReply],
    ) -> worker_pb2.ControlReply:
        """Commands to the worker as a whole."""
        loop = self._loop
        command = request.WhichOneof("command")
        if command == "collect_metrics":
            return worker_pb2.ControlReply(ok=True, metrics=self.metrics_page())
        if loop is None:
            return worker_pb2.ControlReply(ok=False, message=f"starting: {self._startup.phase}")
        if command == "health":
            stalled = loop.stalled_s()
            limit = loop.engine.config.stall_timeout_s
            return worker_pb2.ControlReply(ok=stalled < limit, message=f"step age {stalled:.1f} s")
        if command == "reset_prefix_cache":
            loop.call(lambda engine: logger.info("forgot %d blocks", engine.reset_prefix_cache()))
            return worker_pb2.ControlReply(ok=True)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no command given")
        raise AssertionError("abort returns never")


def _session_number(request_id: str) -> int:
    return int(request_id.partition("/")[0])
