"""The application, put together: everything is built once, here, and passed on by hand.

Boundary (ids, errors, log) > CORS > Authentication > routes
"""

from __future__ import annotations

import asyncio
import logging
import platform
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from quire import __version__
from quire.gateway.admin import AdminRoutes
from quire.gateway.admission import Admission
from quire.gateway.auth import Authentication, api_keys
from quire.gateway.boundary import Boundary
from quire.gateway.continuation import Patience
from quire.gateway.health import Health
from quire.gateway.pacemaker import Pacemaker
from quire.gateway.pipeline import Parts, Pipeline
from quire.gateway.placement import LeastLoad
from quire.gateway.routes import Facts, ModelRoutes, TokenRoutes, TraceRoute, embeddings
from quire.gateway.served_model import ModelLoader
from quire.gateway.trace import Traces
from quire.gateway.traffic import Traffic
from quire.gateway.worker_client import Vigilance, WorkerClient
from quire.gateway.workers import Workers
from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from prometheus_client.registry import CollectorRegistry
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from quire.cluster.rpc import Cluster
    from quire.config.gateway import GatewayConfig, TokenizerConfig
    from quire.gateway.placement import Placement
    from quire.gateway.worker import Worker
    from quire.gateway.workers import Joining
    from quire.telemetry.instruments import Instruments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upstream:
    """Whom the gateway talks to."""

    workers: Sequence[Worker]
    placement: Placement = field(default_factory=LeastLoad)
    owns_workers: bool = True
    """/metrics shows the workers' too: nobody else scrapes them."""
    joining: Joining | None = None
    """How workers come and go; `workers` are all of them without."""


def clients_of(
    workers: Mapping[str, str], config: GatewayConfig, cluster: Cluster | None = None
) -> list[WorkerClient]:
    """Workers by name and gRPC address."""
    connect = connector(config, cluster)
    return [connect(name, address) for name, address in workers.items()]


def connector(
    config: GatewayConfig, cluster: Cluster | None = None
) -> Callable[[str, str], WorkerClient]:
    """Makes a worker's client from its name and gRPC address."""
    vigilance = Vigilance(config.worker_silence, config.max_step_age)
    return lambda name, address: WorkerClient(address, vigilance, name=name, cluster=cluster)


def create_app(
    config: GatewayConfig,
    source: TokenizerConfig,
    upstream: Upstream,
    instruments: Instruments,
    registry: CollectorRegistry,
) -> ASGIApp:
    """The gateway for the workers of one model.

    `source` says where the tokenizer is; `registry` is what /metrics shows, with `instruments`
    registered in it. The lifespan must run: it keeps the connections to the workers.
    """
    traffic = Traffic(instruments)
    fleet = Workers(
        upstream.workers,
        Patience(config.max_resubmissions, config.worker_wait),
        max_backlog=config.max_stream_backlog,
        placement=upstream.placement,
        on_resubmission=traffic.resubmitted,
    )
    if upstream.joining is not None:
        fleet.follow(upstream.joining)
    parts = Parts(
        config=config,
        workers=fleet,
        models=ModelLoader(config, source, fleet),
        admission=Admission(config.max_open_requests),
        pacemaker=Pacemaker(config.sse_keep_alive_interval),
        traffic=traffic,
        traces=Traces(),
        threads=ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenize"),
    )
    instruments.get(m.BUILD_INFO).set(version=__version__, python=platform.python_version())
    routes = _routes(parts, Health(fleet, parts.models), registry, upstream.owns_workers)
    app: ASGIApp = Router(routes, redirect_slashes=False, lifespan=lambda _: _lifespan(parts))
    app = Authentication(app, api_keys(config.api_key))
    if config.allowed_origins:
        app = CORSMiddleware(
            app, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    known = frozenset(route.path for route in routes if isinstance(route, Route))
    return Boundary(app, parts.traffic, known, log_access=not config.disable_access_log)


def _routes(
    parts: Parts, health: Health, registry: CollectorRegistry, owns_workers: bool
) -> list[BaseRoute]:
    pipeline, models, tokens = Pipeline(parts), ModelRoutes(parts), TokenRoutes(parts)
    facts = Facts(parts, registry, with_workers=owns_workers)
    admin = AdminRoutes(parts.workers, parts.config.admin_key)
    return [
        Route("/v1/chat/completions", _Raw(pipeline.chat), methods=["POST"]),
        Route("/v1/completions", _Raw(pipeline.completions), methods=["POST"]),
        Route("/v1/requests/{id:path}/trace", TraceRoute(parts).retrieve),
        Route("/v1/models", models.list),
        Route("/v1/models/{name:path}", models.retrieve),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/livez", health.livez),
        Route("/readyz", health.readyz),
        Route("/startupz", health.startupz),
        Route("/health", health.health),
        Route("/ping", health.health, methods=["GET", "POST"]),
        Route("/version", facts.version),
        Route("/load", facts.load),
        Route("/metrics", facts.metrics),
        Route("/sleep", admin.sleep, methods=["POST"]),
        Route("/wake_up", admin.wake_up, methods=["POST"]),
        Route("/is_sleeping", admin.is_sleeping),
    ]


class _Raw:
    """An endpoint that speaks ASGI: Starlette wraps functions, and leaves objects alone."""

    def __init__(self, serve: Callable[[Scope, Receive, Send], object]) -> None:
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send)  # type: ignore[misc]


async def _kept(job: Coroutine[Any, Any, None], name: str) -> None:
    """Run a part of the gateway; a bug in it ends the process, which cannot do without."""
    try:
        await job
    except Exception:
        logger.critical("the %s failed; stopping", name, exc_info=True)
        signal.raise_signal(signal.SIGTERM)


@asynccontextmanager
async def _lifespan(parts: Parts) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(_kept(job, name), name=name)
        for name, job in (
            ("worker connections", parts.workers.run()),
            ("placement", parts.workers.placement.run()),
            ("model", parts.models.run()),
            ("pacemaker", parts.pacemaker.run()),
        )
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        parts.threads.shutdown(wait=False, cancel_futures=True)
