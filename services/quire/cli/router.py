"""`quire router`: the routing service in a process of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quire.cli.standalone import never, require_pod, require_token, run_alone
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, parse
from quire.config.logs import LogConfig
from quire.config.router import RouterConfig, RouterServerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    prog="quire router",
    summary="Choose workers for the requests of gateways.",
    owners=(RouterServerConfig, RouterConfig, ClusterConfig, LogConfig),
    reads_environment=True,
)


def run(argv: Sequence[str]) -> int:
    """Route until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    server, cluster = resolved.get(RouterServerConfig), resolved.get(ClusterConfig)
    require_token(COMMAND, server.listen, cluster)
    require_pod(COMMAND, server)

    async def serve() -> int:
        from quire.router.server import RouterOptions
        from quire.router.server import serve as serve_router

        options = RouterOptions(
            config=resolved.get(RouterConfig),
            listen=server.listen,
            pods=server.pods,
            cluster=cluster,
            http_port=server.http_port,
            discovery=server,
            deletion_cost=server.deletion_cost,
            readiness_gate=server.readiness_gate,
        )
        return await serve_router(options, never)

    return run_alone(resolved.get(LogConfig), serve())
