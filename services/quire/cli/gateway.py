"""`quire gateway`: the HTTP server alone; its workers run elsewhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quire.cli.http_server import FirstReady, NoChildren, Upstreams, run_server
from quire.cli.standalone import require_pod
from quire.cli.startup import Quiet, StartupWatch
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig, TokenizerConfig, UpstreamConfig
from quire.config.logs import LogConfig
from quire.config.router import RouterConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.cli.http_server import HttpServer, Watch

COMMAND = Command(
    prog="quire gateway",
    summary="Serve an OpenAI-compatible HTTP API in front of workers that run elsewhere.",
    owners=(
        UpstreamConfig,
        GatewayConfig,
        TokenizerConfig,
        RouterConfig,
        ClusterConfig,
        LogConfig,
    ),
    reads_environment=True,
    epilog="Without --router, this process routes by itself.",
)


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    require_pod(COMMAND, resolved.get(UpstreamConfig))
    upstreams = Upstreams(
        workers=resolved.get(UpstreamConfig).workers,
        cluster=resolved.get(ClusterConfig),
        tokenizer=resolved.get(TokenizerConfig),
        router=resolved.get(RouterConfig),
        routers=resolved.get(UpstreamConfig).router,
        discovery=resolved.get(UpstreamConfig),
    )

    async def serve(server: HttpServer) -> int:
        server.model_name = next(iter(server.config.served_model_name), "")
        watches: list[Watch] = [
            StartupWatch(address, Quiet(), server.ready, upstreams.cluster)
            for address in upstreams.workers.values()
        ]
        if not upstreams.discovery.is_fixed:
            watches = [FirstReady(server)]
        return await server.run(upstreams, NoChildren(), watches)

    return run_server(COMMAND.prog, resolved.get(GatewayConfig), resolved.get(LogConfig), serve)
