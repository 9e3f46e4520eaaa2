"""The HTTP server of `quire serve` and `quire gateway`, from its options to its exit code.

Order of a start: options, socket (the port is open from here on), other processes, and only then
the imports of the HTTP stack, which take as long as everything before together. Order of an end:
no new connections, requests in progress finish or run out of time, the other processes, exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from quire.cli.listen import ListenError, closing, listen
from quire.config.discovery import NO_DISCOVERY
from quire.telemetry import logging as logs
from quire.telemetry.instruments import Instruments, new_registry
from quire.telemetry.metrics import gateway_instruments, router_instruments

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    import uvicorn
    from prometheus_client.registry import CollectorRegistry

    from quire.config.cluster import ClusterConfig
    from quire.config.discovery import DiscoveryConfig
    from quire.config.gateway import GatewayConfig, TokenizerConfig
    from quire.config.logs import LogConfig
    from quire.config.router import RouterConfig
    from quire.gateway.app import Upstream

logger = logging.getLogger(__name__)

CANNOT_LISTEN = 1
FORCED = 130
TERMINATED = 143
SIGNALS = (signal.SIGTERM, signal.SIGINT)
READY_POLL_S = 0.05
SPAWN_S = 0.01
"""For the supervisors to start their processes."""
GIVE_UP_GRACE_S = 1
"""For answering requests that waited for a worker which will not come."""


class Children(Protocol):
    """Processes that live with the server."""

    async def run(self) -> int:
        """Keep them until `stop`; returns 0 then, and else why there is no use in going on."""

    async def stop(self) -> None:
        """End them. `run` returns afterwards."""

    def kill(self) -> None:
        """End them now."""


class Watch(Protocol):
    """Looks after a start."""

    async def run(self) -> None:
        """Until cancelled, or until there is nothing more to see."""


class NoChildren:
    """For a server whose workers others run."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    async def run(self) -> int:
        """Wait for `stop`."""
        await self._stopped.wait()
        return 0

    async def stop(self) -> None:
        """Let `run` return."""
        self._stopped.set()

    def kill(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Upstreams:
    """Whom the server talks to."""

    workers: Mapping[str, str]
    """Name -> gRPC address."""
    cluster: ClusterConfig
    tokenizer: TokenizerConfig
    router: RouterConfig
    """Of the router in this process, when no other is named."""
    routers: Sequence[str] = ()
    """gRPC addresses of routers to ask."""
    owns_workers: bool = False
    """They are this server's own, and their metrics are shown with its."""
    discovery: DiscoveryConfig = NO_DISCOVERY
    """Who tells of workers beside those in `workers`."""


@dataclass
class HttpServer:
    """One run of the server."""

    config: GatewayConfig
    """With the port that was bound, where the option said 0."""
    sock: socket.socket
    model_name: str = ""
    """As greeted with, when known from the start."""
    registry: CollectorRegistry = field(default_factory=lambda: new_registry("gateway"))
    greeted: bool = False
    app: Any = None
    """The ASGI application, once it is built."""

    def __post_init__(self) -> None:
        self.instruments: Instruments = gateway_instruments(self.registry)
        self.began = time.monotonic()

    async def run(self, upstreams: Upstreams, children: Children, watches: Sequence[Watch]) -> int:
        """Serve until a signal, or until the children are given up; returns the exit code."""
        with _Signals(children) as signals:
            living = asyncio.create_task(children.run())
            await asyncio.sleep(SPAWN_S)  # they start before the imports below
            server = self._make_server(upstreams)
            signals.attach(server)
            watching = asyncio.gather(*(watch.run() for watch in watches))
            try:
                serving = asyncio.create_task(server.serve(sockets=[self.sock]))
                await asyncio.wait({serving, living}, return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():  # every worker was given up
                    server.config.timeout_graceful_shutdown = GIVE_UP_GRACE_S
                    server.should_exit = True
                await serving
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                await children.stop()
            code = await living
            return FORCED if server.force_exit else code

    async def ready(self, model: str) -> None:
        """A worker is ready; for the first one, say how to use the server."""
        # The application has yet to notice, and only its probe says when it has.
        while self.app is None or await _status(self.app, "/readyz") != 200:  # noqa: ASYNC110
            await asyncio.sleep(READY_POLL_S)
        if self.greeted:
            logger.info("another worker is ready")
        else:
            self.greeted = True
            took = time.monotonic() - self.began
            print(greeting(self.config, self.model_name or model, took), flush=True)

    def _make_server(self, upstreams: Upstreams) -> uvicorn.Server:
        import uvicorn

        from quire.gateway.app import create_app
        from quire.gateway.http_protocol import BoundedHttpProtocol

        options = self.config
        upstream = self._connect(upstreams)
        self.app = create_app(
            options, upstreams.tokenizer, upstream, self.instruments, self.registry
        )
        config = uvicorn.Config(
            self.app,
            http=BoundedHttpProtocol,
            log_config=None,
            log_level=options.uvicorn_log_level,
            access_log=False,
            server_header=False,
            root_path=options.root_path,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            timeout_graceful_shutdown=round(options.shutdown_timeout),
            lifespan="on",
            ws="none",
        )
        server = uvicorn.Server(config)
        # Signals are ours: they end the children too.
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        return server

    def _connect(self, upstreams: Upstreams) -> Upstream:
        from quire.cluster.rpc import Cluster
        from quire.gateway.app import Upstream, clients_of, connector
        from quire.gateway.placement import LeastLoad
        from quire.gateway.routers import OwnRouter, RemoteRouter, Replica
        from quire.gateway.routing import RouterPlacement
        from quire.gateway.workers import Joining
        from quire.router.coordinated import discover

        cluster = Cluster(upstreams.cluster)
        pods = discover(upstreams.discovery, upstreams.workers, cluster)
        is_fixed = upstreams.discovery.is_fixed
        routers: list[Replica] = [RemoteRouter(address, cluster) for address in upstreams.routers]
        has_choice = not is_fixed or len(upstreams.workers) > 1
        if not routers and has_choice:
            instruments = router_instruments(self.registry)
            routers.append(OwnRouter(upstreams.router, pods, instruments, cluster))
        return Upstream(
            workers=clients_of(upstreams.workers, self.config, cluster) if is_fixed else [],
            joining=None if is_fixed else Joining(pods, connector(self.config, cluster)),
            placement=RouterPlacement(routers, self.instruments) if routers else LeastLoad(),
            owns_workers=upstreams.owns_workers,
        )


@dataclass(frozen=True)
class FirstReady:
    """Greets when the server is ready, whichever workers it has by then."""

    server: HttpServer

    async def run(self) -> None:
        """Once."""
        await self.server.ready("")


def run_server(
    prog: str,
    config: GatewayConfig,
    log: LogConfig,
    serving: Callable[[HttpServer], Coroutine[Any, Any, int]],
) -> int:
    """Open the socket, then run `serving` to its end; returns the exit code."""
    logs.configure(log.log_level, "json" if log.log_format == "json" else "text")
    try:
        sock, config = listen(config)
    except ListenError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return CANNOT_LISTEN
    signal.signal(signal.SIGTERM, _exit_early)
    import uvloop

    with closing(config, sock):
        return uvloop.run(serving(HttpServer(config, sock)))


def greeting(gateway: GatewayConfig, model: str, took_s: float) -> str:
    """What a new user needs: where the server is, and a command that gets an answer from it.

    Without a model's name, which a fleet's gateway is not told, the command asks for it.
    """
    where = gateway.url if gateway.uds is None else gateway.uds
    if not model:
        return f"quire is ready at {where} ({took_s:.1f} s)\ncurl {gateway.url}/v1/models"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    parts = ["curl", gateway.url + "/v1/chat/completions"]
    if gateway.uds is not None:
        parts[1:1] = ["--unix-socket", shlex.quote(gateway.uds)]
    if gateway.api_key:
        parts.append('-H "Authorization: Bearer $QUIRE_API_KEY"')
    parts += ["-H 'Content-Type: application/json'", "-d", shlex.quote(body)]
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

    def __init__(self, children: Children) -> None:
        self._children = children
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
            self._children.kill()
        else:
            logger.info("%s: finishing requests in progress; once more to stop now", name)
            self._server.should_exit = True
