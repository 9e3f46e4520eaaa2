"""`quire serve MODEL`: the HTTP server in this process, each engine in a child."""

from __future__ import annotations

import os
from dataclasses import replace
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

from quire.cli.http_server import Upstreams, run_server
from quire.cli.replicas import replicas_of
from quire.cli.supervisor import private_folder
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig, TokenizerConfig
from quire.config.logs import LogConfig
from quire.config.serve import LocalConfig
from quire.config.transfer import TransferConfig
from quire.telemetry.metrics import WORKER_RESTARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.cli.http_server import HttpServer
    from quire.config.resolve import Resolved

COMMAND = Command(
    prog="quire serve",
    summary="Serve a model over an OpenAI-compatible HTTP API, with workers on this machine.",
    owners=(EngineConfig, GatewayConfig, LocalConfig, TransferConfig, LogConfig),
    positional="model",
    reads_environment=True,
    epilog="Without MODEL, the demo model inside the package is served: nothing is downloaded.",
)


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    gateway, log = resolved.get(GatewayConfig), resolved.get(LogConfig)
    return run_server(COMMAND.prog, gateway, log, lambda server: _serve(resolved, server))


async def _serve(resolved: Resolved, server: HttpServer) -> int:
    """With workers of our own, which end when this does."""
    engine, log = resolved.get(EngineConfig), resolved.get(LogConfig)
    local, transfer = resolved.get(LocalConfig), _transfer(resolved)
    server.model_name = next(iter(server.config.served_model_name), engine.model)
    common: dict[str, Any] = {
        "served_model_name": server.model_name,
        "log_level": log.log_level,
        "log_format": log.log_format,
    }
    if local.prefill:
        common["transfer"] = to_mapping(transfer)
    on_restart = server.instruments.get(WORKER_RESTARTS).inc
    with private_folder() as folder:
        replicas = replicas_of(engine, local.roles, folder, common, on_restart)
        upstreams = Upstreams(
            workers=replicas.addresses,
            cluster=transfer,
            tokenizer=TokenizerConfig(
                tokenizer=engine.tokenizer or engine.model, revision=engine.revision
            ),
        )
        return await server.run(upstreams, replicas, replicas.watches(server.ready, transfer))


def _transfer(resolved: Resolved) -> TransferConfig:
    """How the processes know each other; by a secret of this run if none was given."""
    config = resolved.get(TransferConfig)
    return config if config.cluster_token else replace(config, cluster_token=token_urlsafe())
