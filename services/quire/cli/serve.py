"""`quire serve MODEL`: the HTTP server in this process, each engine in a child.

Order of a start: options, socket (the port is open from here on), worker processes, and only then
the imports of the HTTP stack, which take as long as everything before together. Order of an end:
no new connections, requests in progress finish or run out of time, workers, exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

from quire.cli.listen import ListenError, closing, listen
from quire.cli.replicas import Replicas, replicas_of, roles_of
from quire.cli.startup import Quiet, StartupWatch
from quire.cli.supervisor import private_folder
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig
from quire.config.logs import LogConfig
from quire.config.transfer import TransferConfig
from quire.telemetry import logging as logs
from quire.telemetry.instruments import new_registry
from quire.telemetry.metrics import WORKER_RESTARTS, gateway_instruments

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    import uvicorn

    from quire.config.resolve import Resolved

logger = logging.getLogger(__name__)

COMMAND = Command(
    prog="quire serve",
    summary="Serve a model over an OpenAI-compatible HTTP API.",
    owners=(EngineConfig, GatewayConfig, TransferConfig, LogConfig),
    positional="model",
    reads_environment=True,
    epilog="Without MODEL, the demo model inside the package is served: nothing is downloaded.",
)
CANNOT_LISTEN = 1
FORCED = 130
TERMINATED = 143
SIGNALS = (signal.SIGTERM, signal.SIGINT)
READY_POLL_S = 0.05
SPAWN_S = 0.01
"""For the supervisors to start their processes."""
GIVE_UP_GRACE_S = 1
"""For answering requests that waited for a worker which will not come."""


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    log, gateway = resolved.get(LogConfig), resolved.get(GatewayConfig)
    logs.configure(log.log_level, "json" if log.log_format == "json" else "text")
    try:
        sock, gateway = listen(gateway)
    except ListenError as error:
        print(f"{COMMAND.prog}: error: {error}", file=sys.stderr)
        return CANNOT_LISTEN
    signal.signal(signal.SIGTERM, _exit_early)
    import uvloop

    with closing(gateway, sock), private_folder() as folder:
        serving = _Serving(resolved, gateway, sock)
        if gateway.worker:
            return uvloop.run(serving.with_workers_at(gateway.worker))
        return uvloop.run(serving.with_own_workers(folder))


@dataclass
class _Serving:
    """One run of the server."""

    resolved: Resolved
    gateway: GatewayConfig
    """With the port that was bound, where the option said 0."""
    sock: socket.socket
    greeted: bool = False
    app: Any = None
    """The ASGI application, once it is built."""

    def __post_init__(self) -> None:
        self.engine = self.resolved.get(EngineConfig)
        self.registry = new_registry("gateway")
        self.instruments = gateway_instruments(self.registry)
        self.began = time.monotonic()

    @property
    def model_name(self) -> str:
        return next(iter(self.gateway.served_model_name), self.engine.model)

    async def with_workers_at(self, addresses: tuple[str, ...]) -> int:
        """Serve with workers that somebody else runs."""
        watches = [StartupWatch(address, Quiet(), self._ready) for address in addresses]
        return await self._serve(addresses, None, watches)

    async def with_own_workers(self, folder: Path) -> int:
        """Serve with workers of our own, which end when this does."""
        log = self.resolved.get(LogConfig)
        common: dict[str, Any] = {
            "served_model_name": self.model_name,
            "log_level": log.log_level,
            "log_format": log.log_format,
        }
        if self.gateway.prefill:
            common["transfer"] = to_mapping(self._transfer())
        on_restart = self.instruments.get(WORKER_RESTARTS).inc
        replicas = replicas_of(self.engine, roles_of(self.gateway), folder, common, on_restart)
        return await self._serve(replicas.addresses, replicas, replicas.watches(self._ready))

    def _transfer(self) -> TransferConfig:
        """How the workers exchange KV blocks; with a secret of this run if none was given."""
        config = self.resolved.get(TransferConfig)
        return config if config.cluster_token else replace(config, cluster_token=token_urlsafe())

    async def _serve(
        self, addresses: Sequence[str], replicas: Replicas | None, watches: list[StartupWatch]
    ) -> int:
        with _Signals(replicas) as signals:
            workers = asyncio.create_task(replicas.run()) if replicas is not None else None
            await asyncio.sleep(SPAWN_S)  # the workers start before the imports below
            server = self._make_server(addresses)
            signals.attach(server)
            watching = asyncio.gather(*(watch.run() for watch in watches))
            try:
                serving = asyncio.create_task(server.serve(sockets=[self.sock]))
                waiting = {serving} if workers is None else {serving, workers}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():  # every worker was given up
                    server.config.timeout_graceful_shutdown = GIVE_UP_GRACE_S
                    server.should_exit = True
                await serving
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                if replicas is not None:
                    await replicas.stop()
            code = await workers if workers is not None else 0
            return FORCED if server.force_exit else code

    def _make_server(self, addresses: Sequence[str]) -> uvicorn.Server:
        import uvicorn

        from quire.gateway.app import create_app
        from quire.gateway.http_protocol import BoundedHttpProtocol

        app = create_app(self.gateway, self.engine, addresses, self.instruments, self.registry)
        self.app = app
        config = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            log_config=None,
            log_level=self.gateway.uvicorn_log_level,
            access_log=False,
            server_header=False,
            root_path=self.gateway.root_path,
            ssl_keyfile=self.gateway.ssl_keyfile,
            ssl_certfile=self.gateway.ssl_certfile,
            timeout_graceful_shutdown=round(self.gateway.shutdown_timeout),
            lifespan="on",
            ws="none",
        )
        server = uvicorn.Server(config)
        # Signals are ours: they end the worker too.
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        return server

    async def _ready(self) -> None:
        """A worker is ready; for the first one, say how to use the server."""
        # The application has yet to notice, and only its probe says when it has.
        while self.app is None or await _status(self.app, "/readyz") != 200:  # noqa: ASYNC110
            await asyncio.sleep(READY_POLL_S)
        if self.greeted:
            logger.info("another worker is ready")
        else:
            self.greeted = True
            took = time.monotonic() - self.began
            print(greeting(self.gateway, self.model_name, took), flush=True)


def greeting(gateway: GatewayConfig, model: str, took_s: float) -> str:
    """What a new user needs: where the server is, and a command that gets an answer from it."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    parts = ["curl", gateway.url + "/v1/chat/completions"]
    if gateway.uds is not None:
        parts[1:1] = ["--unix-socket", shlex.quote(gateway.uds)]
    if gateway.api_key:
        parts.append('-H "Authorization: Bearer $QUIRE_API_KEY"')
    parts += ["-H 'Content-Type: application/json'", "-d", shlex.quote(body)]
    where = gateway.url if gateway.uds is None else gateway.uds
    return f"quire: {model} is ready at {where} ({took_s:.1f} s)\n{' '.join(parts)}"


async def _status(app: Any, path: str) -> int:
    """Status of a GET to an application in this process, without the network in between."""
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [], "client": None, "server": None,
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


def _exit_early(*_: object) -> None:
    """A SIGTERM before the server runs: end, but remove what was made."""
    raise SystemExit(TERMINATED)


class _Signals:
    """SIGTERM and SIGINT drain and end the server; a second one ends it at once."""

    def __init__(self, replicas: Replicas | None) -> None:
        self._replicas = replicas
        self._server: uvicorn.Server | None = None
        self._seen = 0

    def __enter__(self) -> _Signals:
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._handle, number.name)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def attach(self, server: uvicorn.Server) -> None:
        """The server to end, also when the signal has come before it."""
        self._server = server
        server.should_exit = self._seen > 0

    def _handle(self, name: str) -> None:
        self._seen += 1
        if self._server is None:
            return
        if self._seen > 1:
            self._server.force_exit = True
            if self._replicas is not None:
                self._replicas.kill()
        else:
            logger.info("%s: finishing requests in progress; once more to stop now", name)
            self._server.should_exit = True
