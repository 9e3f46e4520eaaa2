"""`/metrics`, `/healthz` and `/readyz` of a process that speaks gRPC, for probes and Prometheus.

Served on the event loop that does the work: a loop that hangs fails its probes. Probes need no
token, the metrics need the cluster's where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from quire.cluster.rpc import HEADER, bearer_is
from quire.config.address import host_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

PAGE_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BACKLOG = 128
LOCAL = "127.0.0.1"
END_S = 1
"""For answers in progress when the process ends."""


@dataclass(frozen=True)
class Status:
    """What a process says about itself."""

    page: Callable[[], str]
    """Prometheus' text format."""
    healthy: Callable[[], bool]
    """False: only a restart helps."""
    ready: Callable[[], bool]
    """Calls can be answered now."""
    token: str | None = None
    """Needed for the page."""


def open_socket(listen: str, port: int) -> socket.socket:
    """Beside the gRPC address `listen`, on its host; a Unix socket's neighbour is loopback.

    Raises OSError naming the port.
    """
    host = host_of(listen) or LOCAL
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        said = os.strerror(error.errno or 0)
        raise OSError(
            f"port {port} of {host} cannot be listened on ({said}): give another http-port, or 0"
        ) from None


async def serve_status(status: Status, sock: socket.socket) -> None:
    """Answer until cancelled."""
    config = uvicorn.Config(
        _app(status), log_config=None, log_level="warning", access_log=False, server_header=False,
        lifespan="off", ws="none", timeout_graceful_shutdown=END_S,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # signals are the process's own
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    with sock:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await serving


def _app(status: Status) -> Starlette:
    async def metrics(request: Request) -> Response:
        header = request.headers.get(HEADER, "")
        if status.token is not None and not bearer_is(status.token, header):
            return PlainTextResponse("the cluster's token is missing or wrong\n", status_code=401)
        return Response(status.page(), media_type=PAGE_TYPE)

    async def healthz(_: Request) -> Response:
        return _answer("healthy", "failed", ok=status.healthy())

    async def readyz(_: Request) -> Response:
        return _answer("ready", "not ready", ok=status.ready())

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    )


def _answer(good: str, bad: str, *, ok: bool) -> Response:
    return JSONResponse({"state": good if ok else bad}, status_code=200 if ok else 503)
