"""`quire serve MODEL`: the HTTP server in this process, each engine in a child."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, fields, replace
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

from quire.cli.http_server import Upstreams, run_server
from quire.cli.ray_workers import Asked, Greeting, ray_workers, with_ray_address
from quire.cli.replicas import Replicas, replicas_of
from quire.cli.routers import Routers, routers_of
from quire.cli.supervisor import private_folder
from quire.cli.up import require_ray
from quire.config.base import to_mapping
from quire.config.cluster import ClusterConfig
from quire.config.engine import EngineConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig, TokenizerConfig
from quire.config.logs import LogConfig
from quire.config.router import RouterConfig
from quire.config.serve import LocalConfig
from quire.config.transfer import TransferConfig
from quire.telemetry.metrics import WORKER_RESTARTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quire.cli.http_server import HttpServer
    from quire.config.resolve import Resolved

COMMAND = Command(
    prog="quire serve",
    summary="Serve a model over an OpenAI-compatible HTTP API, with workers on this machine.",
    owners=(EngineConfig, GatewayConfig, LocalConfig, RouterConfig, TransferConfig, LogConfig),
    positional="model",
    reads_environment=True,
    epilog="Without MODEL, the demo model inside the package is served: nothing is downloaded.",
)


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    resolved = parse(COMMAND, with_ray_address(argv), os.environ)
    gateway, log = resolved.get(GatewayConfig), resolved.get(LogConfig)
    serving = _serve
    if resolved.get(LocalConfig).ray is not None:
        require_ray(COMMAND)
        serving = _serve_on_ray
    return run_server(COMMAND.prog, gateway, log, lambda server: serving(resolved, server))


async def _serve_on_ray(resolved: Resolved, server: HttpServer) -> int:
    """With workers that Ray keeps, which end when this does."""
    engine, transfer = resolved.get(EngineConfig), _transfer(resolved)
    server.model_name = next(iter(server.config.served_model_name), engine.model)
    with private_folder() as folder:
        asked = Asked(engine, resolved.get(LocalConfig), transfer, resolved.get(LogConfig))
        children = ray_workers(asked, server, folder)
        upstreams = Upstreams(
            workers={},
            cluster=transfer,
            tokenizer=_tokenizer(engine),
            router=resolved.get(RouterConfig),
            discovery=children.discovery,
        )
        return await server.run(upstreams, children, [Greeting(server, children.coordinator)])


async def _serve(resolved: Resolved, server: HttpServer) -> int:
    """With workers and routers of our own, which end when this does."""
    engine, transfer = resolved.get(EngineConfig), _transfer(resolved)
    server.model_name = next(iter(server.config.served_model_name), engine.model)
    with private_folder() as folder:
        children = _children(resolved, server, transfer, folder)
        upstreams = Upstreams(
            workers=children.workers.addresses,
            cluster=transfer,
            tokenizer=_tokenizer(engine),
            router=resolved.get(RouterConfig),
            routers=children.routers.addresses,
            owns_workers=True,
        )
        watches = children.workers.watches(server.ready, transfer)
        return await server.run(upstreams, children, watches)


@dataclass(frozen=True)
class _Children:
    """The server lives as long as its workers; routers may come and go."""

    workers: Replicas
    routers: Routers

    async def run(self) -> int:
        """Keep all of them until `stop`, or until the workers are given up."""
        routing = asyncio.create_task(self.routers.run())
        try:
            return await self.workers.run()
        finally:
            await self.routers.stop()
            await routing

    async def stop(self) -> None:
        """End them all. `run` returns afterwards."""
        await asyncio.gather(self.workers.stop(), self.routers.stop())

    def kill(self) -> None:
        """End them now."""
        self.workers.kill()
        self.routers.kill()


def _children(
    resolved: Resolved, server: HttpServer, transfer: TransferConfig, folder: Path
) -> _Children:
    """Nothing is started yet."""
    log, local = resolved.get(LogConfig), resolved.get(LocalConfig)
    logs: dict[str, Any] = {"log_level": log.log_level, "log_format": log.log_format}
    common = logs | {"served_model_name": server.model_name}
    if local.prefill:
        common["transfer"] = to_mapping(transfer)
    on_restart = server.instruments.get(WORKER_RESTARTS).inc
    workers = replicas_of(resolved.get(EngineConfig), local.roles, folder, common, on_restart)
    options = logs | {
        "router": to_mapping(resolved.get(RouterConfig)),
        "pods": workers.addresses,
        "cluster": {f.name: getattr(transfer, f.name) for f in fields(ClusterConfig)},
    }
    return _Children(workers, routers_of(local.routers, folder, options))


def _tokenizer(engine: EngineConfig) -> TokenizerConfig:
    return TokenizerConfig(tokenizer=engine.tokenizer or engine.model, revision=engine.revision)


def _transfer(resolved: Resolved) -> TransferConfig:
    """How the processes know each other; by a secret of this run if none was given."""
    config = resolved.get(TransferConfig)
    return config if config.cluster_token else replace(config, cluster_token=token_urlsafe())
