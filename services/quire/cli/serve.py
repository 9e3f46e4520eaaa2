"""`quire serve MODEL`: the HTTP server in this process, the engine in a child.

Order of a start: options, socket (the port is open from here on), worker process, and only then
the imports of the HTTP stack, which take as long as everything before together. Order of an end:
no new connections, requests in progress finish or run out of time, worker, exit.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.cli.listen import ListenError, closing, listen
from quire.cli.startup import StartupWatch, display_for
from quire.cli.supervisor import Supervisor, private_socket
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig
from quire.config.logs import LogConfig
from quire.telemetry import logging as logs
from quire.telemetry.instruments import new_registry
from quire.telemetry.metrics import WORKER_RESTARTS, gateway_instruments

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    import uvicorn

    from quire.config.resolve import Resolved

logger = logging.getLogger(__name__)

COMMAND = Command(
    prog="quire serve",
    summary="Serve a model over an OpenAI-compatible HTTP API.",
    owners=(EngineConfig, GatewayConfig, LogConfig),
    positional="model",
    reads_environment=True,
    epilog="Without MODEL, the demo model inside the package is served: nothing is downloaded.",
)
CANNOT_LISTEN = 1
FORCED = 130
TERMINATED = 143
SIGNALS = (signal.SIGTERM, signal.SIGINT)
READY_POLL_S = 0.05
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

    with closing(gateway, sock), private_socket() as worker_socket:
        serving = _Serving(resolved, gateway, sock)
        if gateway.worker is not None:
            return uvloop.run(serving.with_worker_at(gateway.worker))
        return uvloop.run(serving.with_own_worker(worker_socket))


@dataclass
class _Serving:
    """One run of the server."""

    resolved: Resolved
    gateway: GatewayConfig
    """With the port that was bound, where the option said 0."""
    sock: socket.socket
    greeted: bool = False

    def __post_init__(self) -> None:
        self.engine = self.resolved.get(EngineConfig)
        self.registry = new_registry("gateway")
        self.instruments = gateway_instruments(self.registry)
        self.began = time.monotonic()

    @property
    def model_name(self) -> str:
        return next(iter(self.gateway.served_model_name), self.engine.model)

    async def with_worker_at(self, address: str) -> int:
        """Serve with a worker that somebody else runs."""
        return await self._serve(address, None)

    async def with_own_worker(self, worker_socket: Any) -> int:
        """Serve with a worker of our own, which ends when this does."""
        log = self.resolved.get(LogConfig)
        supervisor = Supervisor(
            options={
                "engine": to_mapping(self.engine),
                "listen": f"unix:{worker_socket}",
                "served_model_name": self.model_name,
                "log_level": log.log_level,
                "log_format": log.log_format,
            },
            socket=worker_socket,
            on_restart=self.instruments.get(WORKER_RESTARTS).inc,
        )
        return await self._serve(f"unix:{worker_socket}", supervisor)

    async def _serve(self, address: str, supervisor: Supervisor | None) -> int:
        with _Signals(supervisor) as signals:
            worker = asyncio.create_task(supervisor.run()) if supervisor is not None else None
            await asyncio.sleep(0)  # the worker starts before the imports below
            server = self._make_server(address)
            signals.attach(server)
            watch = self._watch(server.config.app, address, supervisor)
            watching = asyncio.create_task(watch.run())
            try:
                serving = asyncio.create_task(server.serve(sockets=[self.sock]))
                waiting = {serving} if worker is None else {serving, worker}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():  # the worker was given up
                    server.config.timeout_graceful_shutdown = GIVE_UP_GRACE_S
                    server.should_exit = True
                await serving
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                if supervisor is not None:
                    await supervisor.stop()
            code = await worker if worker is not None else 0
            return FORCED if server.force_exit else code

    def _make_server(self, address: str) -> uvicorn.Server:
        import uvicorn

        from quire.gateway.app import create_app
        from quire.gateway.http_protocol import BoundedHttpProtocol

        app = create_app(self.gateway, self.engine, address, self.instruments, self.registry)
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

    def _watch(self, app: Any, address: str, supervisor: Supervisor | None) -> StartupWatch:
        """Show each start of the worker; at the end of the first, say how to use the server."""

        async def ready() -> None:
            if supervisor is not None:
                supervisor.ready()
            # The application has yet to notice, and only its probe says when it has.
            while await _status(app, "/readyz") != 200:  # noqa: ASYNC110
                await asyncio.sleep(READY_POLL_S)
            if self.greeted:
                logger.info("ready again")
            else:
                took = time.monotonic() - self.began
                print(greeting(self.gateway, self.model_name, took), flush=True)
            self.greeted = True

        return StartupWatch(address, display_for(), ready)


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

    def __init__(self, supervisor: Supervisor | None) -> None:
        self._supervisor = supervisor
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
            if self._supervisor is not None:
                self._supervisor.kill()
        else:
            logger.info("%s: finishing requests in progress; once more to stop now", name)
            self._server.should_exit = True
