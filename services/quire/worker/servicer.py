"""The Worker service over an engine loop: start-up, health, the end, and each rpc's part in it.

The engine speaks to it as its `Sink`, on the engine's thread; everything else is on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc

from quire.engine.loop import EngineLoop
from quire.proto import worker_pb2, worker_pb2_grpc
from quire.telemetry.instruments import render
from quire.transfer.state import new_number
from quire.worker import convert
from quire.worker.control import Commands
from quire.worker.disaggregation import Disaggregation, Surroundings
from quire.worker.session import SlowGateway
from quire.worker.sessions import Sessions
from quire.worker.standing import Standing, Weights
from quire.worker.watch import updates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client.registry import CollectorRegistry

    from quire.api.errors import ApiError
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
READY_STEP_AGE_S = 10.0
"""Without progress for this long the engine counts as hung: requests are better off elsewhere."""
DRAIN_MIN_S = 0.5
"""For routers and gateways to hear of it."""
DRAIN_POLL_S = 0.05
NO_EXCHANGE = "this worker exchanges no KV blocks"


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
        self._commands: Commands | None = None
        self._standing = Standing(Weights())
        self._sessions = Sessions(self._standing, metrics)
        self._disaggregation: Disaggregation | None = None

    # ---- start-up

    def report(self, startup: Startup) -> None:
        """Loading went on. Any thread."""
        self._startup = convert.startup_to(startup)

    def attach(self, engine: Engine, transfer: TransferOptions | None) -> EngineLoop:
        """The engine is loaded: serve with it, and exchange KV blocks if asked to.

        Raises OSError when a port for KV blocks is taken, ValueError when their staging is too
        small.
        """
        loop = EngineLoop(engine, self)
        if transfer is not None:
            around = Surroundings(loop, self.incarnation, self._metrics)
            self._disaggregation = Disaggregation.start(transfer, around)
            self._standing.set_weights(transfer.role.weights)
        pinned = transfer is not None and "nixl" in transfer.config.kv_transports
        self._commands = Commands(
            loop, self._standing, self._disaggregation, has_pinned_pool=pinned
        )
        self._loop = loop
        self._sessions.attach(loop, self._disaggregation)
        loop.start()
        return loop

    # ---- health

    @property
    def live(self) -> bool:
        """The engine makes progress, or is being loaded: nothing that a restart would mend."""
        if self._loop is None:
            return not self.died.is_set()
        return self._loop.stalled_s() < self._loop.engine.config.stall_timeout_s

    @property
    def ready(self) -> bool:
        """Requests are taken, and the engine moves."""
        if self._loop is None or self._standing.refusal() is not None:
            return False
        return self._loop.stalled_s() < READY_STEP_AGE_S

    def metrics_page(self) -> str:
        """The engine's metrics in Prometheus' text format."""
        if (loop := self._loop) is not None:
            self._metrics.state(loop.state, loop.stalled_s())
            if (gang := loop.engine.model.gang) is not None:
                self._metrics.ranks(gang)
        return render(self._registry)

    # ---- the end

    @property
    def serving(self) -> bool:
        """The engine is loaded and lives."""
        return self._loop is not None

    @property
    def draining(self) -> bool:
        """The worker is about to end."""
        return self._standing.is_draining

    def drain(self, timeout_s: float) -> None:
        """Take no new requests; `drained` returns when the others have gone, or time is up."""
        logger.info("draining for up to %g s; once more to stop now", timeout_s)
        self._standing.drain(timeout_s)

    async def drained(self) -> None:
        """Return when a drain is over."""
        standing = self._standing
        while standing.drain_deadline is None:
            await standing.changed(60.0)
        await standing.changed(DRAIN_MIN_S)
        # Emptiness is polled: it is made of what sessions, the engine and transfers hold.
        while not self._is_empty() and time.monotonic() < standing.drain_deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        logger.info("drained: %d requests left", self._sessions.num_requests)

    def _is_empty(self) -> bool:
        has_jobs = self._disaggregation is not None and self._disaggregation.num_jobs > 0
        if has_jobs or self._sessions.num_requests:
            return False
        return self._commands is None or self._commands.is_idle()

    async def detach(self) -> None:
        """The engine stops: end what is exchanged with other workers."""
        self._loop = None
        self._sessions.detach()
        self.end()
        if self._disaggregation is not None:
            await self._disaggregation.close()

    def end(self) -> None:
        """The server is about to stop: whoever watches is told by the end of the stream."""
        self._standing.end()

    # ---- Sink: called on the engine thread

    def on_added(self, request: EngineRequest) -> None:
        """A request was queued."""
        self._metrics.added(request)

    def on_step(self, record: StepRecord, outputs: list[ChoiceOutput]) -> None:
        """A step finished."""
        self._metrics.step(record, outputs)
        if outputs:
            self._asyncio.call_soon_threadsafe(self._sessions.deliver, record.step, outputs)

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
        self._asyncio.call_soon_threadsafe(self._sessions.reject, request_id, error)

    def on_death(self, error: BaseException) -> None:
        """The engine failed."""
        self._asyncio.call_soon_threadsafe(self.fail_all, f"the engine failed: {error}")

    def fail_all(self, message: str) -> None:
        """The engine is lost: every request is told. On the event loop."""
        self._loop = None
        self._sessions.fail_all(message)
        self.died.set()

    # ---- Session

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionReply],
    ) -> AsyncIterator[worker_pb2.SessionReply]:
        """All requests of one gateway."""
        try:
            # closed here: it would end its requests when it is collected, some time later
            async with aclosing(self._sessions.serve(request_iterator)) as replies:
                async for reply in replies:
                    yield reply
        except SlowGateway:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway reads too slowly")

    # ---- Prefill

    async def Prefill(
        self,
        request: worker_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillReply],
    ) -> AsyncIterator[worker_pb2.PrefillReply]:
        """Compute a prompt for another worker."""
        refusal = self._standing.refusal()
        if self._disaggregation is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, NO_EXCHANGE)
        elif refusal is not None:
            failed = worker_pb2.PrefillFailed(
                code=worker_pb2.Failure.CODE_NOT_READY, message=refusal.message
            )
            yield worker_pb2.PrefillReply(failed=failed)
        else:
            async with aclosing(self._disaggregation.prefill.serve(request)) as replies:
                async for reply in replies:
                    yield reply

    async def Fetch(
        self,
        request: worker_pb2.FetchRequest,
        context: grpc.aio.ServicerContext[worker_pb2.FetchRequest, worker_pb2.FetchReply],
    ) -> AsyncIterator[worker_pb2.FetchReply]:
        """Hand out cached blocks, while draining too."""
        if self._disaggregation is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, NO_EXCHANGE)
        else:
            async with aclosing(self._disaggregation.source.serve(request)) as replies:
                async for reply in replies:
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
            if self._standing.is_over:
                return
            await asyncio.sleep(WATCH_STARTUP_S)
        model = convert.model_info(loop.engine, self.incarnation)
        model.address = self.address
        async for update in updates(loop, self._standing, model, request, self._disaggregation):
            if self._loop is None:
                return
            yield update

    # ---- Control

    async def Control(
        self,
        request: worker_pb2.ControlRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ControlRequest, worker_pb2.ControlReply],
    ) -> worker_pb2.ControlReply:
        """Commands to the worker as a whole."""
        command = request.WhichOneof("command")
        if command == "collect_metrics":
            return worker_pb2.ControlReply(ok=True, metrics=self.metrics_page())
        if command == "health":
            return worker_pb2.ControlReply(ok=self.live, health=self._health())
        if command is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no command given")
        if self._commands is None or self._loop is None:
            return worker_pb2.ControlReply(ok=False, message=f"starting: {self._startup.phase}")
        return await self._commands.run(request)

    def _health(self) -> worker_pb2.HealthReport:
        report = worker_pb2.HealthReport(live=self.live, ready=self.ready)
        if (loop := self._loop) is not None:
            convert.describe_engine(report, loop.state, loop.stalled_s())
        convert.with_standing(report, self._standing)
        report.gateways = len(self._sessions)
        if (parts := self._disaggregation) is not None:
            report.prompts_for_others = parts.num_jobs
            for address, state in parts.peers.states().items():
                report.peers.add(address=address, state=state)
        return report
