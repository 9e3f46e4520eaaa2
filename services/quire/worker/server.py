"""The worker process: serves gRPC at once, loads the engine behind it, and dies loudly.

Exit codes: 0 after an orderly stop, 1 when the engine failed or stalled; its requests have been
told by then. With one line on stderr that says why, 2 when the model cannot be served as
configured, 75 when it cannot be now (see `quire.config.exit_codes`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2_grpc

from quire.cluster.health import HealthService
from quire.cluster.parent import parent_gone
from quire.cluster.rpc import PLAIN, Cluster
from quire.config.exit_codes import exit_code
from quire.config.last_word import PREFIX
from quire.engine.engine import Engine
from quire.proto import worker_pb2_grpc
from quire.telemetry import metrics as m
from quire.telemetry.instruments import new_registry
from quire.worker.metrics import EngineMetrics
from quire.worker.servicer import WorkerService

if TYPE_CHECKING:
    from quire.config.cluster import ClusterConfig
    from quire.config.engine import EngineConfig
    from quire.engine.loop import EngineLoop
    from quire.engine.parallel.spread import Spread
    from quire.engine.runner.load import Startup
    from quire.telemetry.instruments import Instruments
    from quire.worker.disaggregation import TransferOptions

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
FLUSH_S = 0.5
"""Time for failures to reach the gateways before the process ends."""
WATCHDOG_S = 0.5
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker process is started with."""

    engine: EngineConfig
    listen: str
    """unix:/path or host:port; beyond loopback the cluster has a token."""
    served_model_name: str
    transfer: TransferOptions | None = None
    """How to exchange KV blocks with other workers; None for not at all."""
    label: str = "0"
    """The `engine` label of its metrics: unlike that of any other worker of the same gateway."""
    cluster: ClusterConfig = PLAIN
    advertise: str | None = None
    """Address under which others reach it; `listen` by default."""
    http_port: int = 0
    """Of probes and metrics over HTTP; 0 for none."""
    spread: Spread | None = None
    """Over which hosts its ranks are spread; None for this one."""
    ends_with_stdin: bool = True
    """Whoever started it holds its stdin, and wants it to end when that closes."""


class _PhaseTimes:
    """Passes loading reports on, and notes how long each phase took."""

    def __init__(self, service: WorkerService, instruments: Instruments) -> None:
        self._service = service
        self._instruments = instruments
        self._phase, self._since = "start", time.monotonic()

    def __call__(self, startup: Startup) -> None:
        if startup.phase != self._phase:
            self.end()
            self._phase = startup.phase
        self._service.report(startup)

    def end(self) -> None:
        """The current phase is over."""
        now = time.monotonic()
        self._instruments.get(m.STARTUP_SECONDS, self._phase).set(now - self._since)
        self._since = now


async def serve(options: WorkerOptions) -> int:
    """Run a worker until it is told to stop or its engine fails; returns the exit code."""
    registry = new_registry("engine", engine=options.label)
    instruments = m.engine_instruments(
        registry, model_name=options.served_model_name, engine=options.label
    )
    service = WorkerService(EngineMetrics(instruments), registry)
    service.address = options.advertise or options.listen
    stop = asyncio.Event()
    try:
        cluster = Cluster(options.cluster)
        server = cluster.server(
            [
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ]
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
        health = HealthService("quire.v1.Worker", lambda: service.live, lambda: service.ready)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        cluster.bind(server, options.listen)
        status = _serve_status(options, service, stop)
    except OSError as error:
        return _cannot(error)
    await server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, service, options, stop)
    try:
        return await _run(options, service, instruments, stop)
    finally:
        if status is not None:
            status.cancel()
        service.end()
        health.end()
        await server.stop(grace=FLUSH_S)


def _serve_status(
    options: WorkerOptions, service: WorkerService, stop: asyncio.Event
) -> asyncio.Task[None] | None:
    """Probes and metrics; the worker ends with them. Raises OSError when the port is taken."""
    if not options.http_port:
        return None
    from quire.cluster.status_server import Status, open_socket, serve_status

    sock = open_socket(options.listen, options.http_port)
    token = options.cluster.cluster_token
    status = Status(service.metrics_page, lambda: service.live, lambda: service.ready, token)
    task = asyncio.create_task(serve_status(status, sock))
    task.add_done_callback(lambda _: stop.set())
    return task


async def _run(
    options: WorkerOptions, service: WorkerService, instruments: Instruments, stop: asyncio.Event
) -> int:
    report = _PhaseTimes(service, instruments)
    orphaned = asyncio.create_task(parent_gone() if options.ends_with_stdin else stop.wait())
    stopped = asyncio.create_task(stop.wait())
    load = asyncio.to_thread(Engine.load, options.engine, report, options.spread)
    loading = asyncio.create_task(load)
    await asyncio.wait((loading, orphaned, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return 0  # told to stop while loading; the loading thread ends with the process
    try:
        engine = loading.result()
    except (ValueError, OSError) as error:
        return _cannot(error)
    report.end()
    _publish_facts(engine, instruments)
    try:
        loop = service.attach(engine, options.transfer)
    except (ValueError, OSError) as error:
        return _cannot(error)
    gc.collect()
    gc.freeze()  # no collection while requests wait walks what stays for good
    logger.info("ready: %d KV blocks", engine.pool.num_blocks)
    dead = asyncio.create_task(_watch_engine(service, loop, options.engine.stall_timeout_s))
    drained = asyncio.create_task(service.drained())
    await asyncio.wait((dead, orphaned, stopped, drained), return_when=asyncio.FIRST_COMPLETED)
    if dead.done():
        await asyncio.sleep(FLUSH_S)
        return 1
    await service.detach()
    loop.stop(STOP_TIMEOUT_S)
    return 0


def _cannot(error: ValueError | OSError) -> int:
    """Say why there is nothing to serve; returns the exit code."""
    print(f"{PREFIX}{error}", file=sys.stderr, flush=True)
    return exit_code(error)


def _on_signal(service: WorkerService, options: WorkerOptions, stop: asyncio.Event) -> None:
    """The first signal drains, the second stops; there is nothing to drain before it serves."""
    if service.draining or not service.serving:
        stop.set()
    else:
        service.drain(options.engine.drain_timeout_s)


async def _watch_engine(service: WorkerService, loop: EngineLoop, stall_timeout_s: float) -> None:
    """Return when the engine has failed, or has made no progress for too long."""
    while not service.died.is_set():
        stalled = loop.stalled_s()
        if stalled > stall_timeout_s:
            logger.error("no step finished for %.0f s while requests wait: giving up", stalled)
            service.fail_all(f"the engine made no progress for {stalled:.0f} s")
            return
        await asyncio.sleep(WATCHDOG_S)


def _publish_facts(engine: Engine, instruments: Instruments) -> None:
    model, config = engine.model, engine.config
    instruments.get(m.CACHE_CONFIG).set(
        block_size=config.block_size,
        num_blocks=engine.pool.num_blocks,
        block_bytes=model.runner.backend.layout.block_bytes,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    instruments.get(m.MODEL_INFO).set(
        model=config.model,
        architecture=model.config.architecture,
        dtype=model.dtype,
        device=model.device,
        max_model_len=model.max_model_len,
    )
