"""The workers of `quire serve --ray`: a coordinator in a child process places them on Ray.

Nothing of Ray is in this process: what happens to Ray does not happen to the server.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.replicas import shared
from quire.cli.supervisor import Patience, Supervisor
from quire.config.base import to_mapping
from quire.config.discovery import DiscoveryConfig
from quire.config.fleet import LOCAL_RAY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quire.cli.http_server import HttpServer
    from quire.config.engine import EngineConfig
    from quire.config.logs import LogConfig
    from quire.config.serve import LocalConfig
    from quire.config.transfer import TransferConfig

END_GRACE_S = 20.0
"""On top of the engines' own time to drain."""


@dataclass(frozen=True)
class RayWorkers:
    """Implements `Children`: the coordinator, which ends the fleet when this process is gone."""

    coordinator: Supervisor
    address: str

    @property
    def discovery(self) -> DiscoveryConfig:
        """How the server finds the workers."""
        return DiscoveryConfig(coordinator=self.address)

    async def run(self) -> int:
        """Keep the coordinator alive until `stop`, or until it says why it cannot go on."""
        return await self.coordinator.run()

    async def stop(self) -> None:
        """End the fleet. `run` returns afterwards."""
        await self.coordinator.stop()

    def kill(self) -> None:
        """End the coordinator now. Engines end when nobody has asked for them for a while."""
        self.coordinator.kill()


@dataclass(frozen=True)
class Greeting:
    """Greets when the server is ready, and lets the coordinator's starts count as successful."""

    server: HttpServer
    coordinator: Supervisor = field(repr=False)

    async def run(self) -> None:
        """Once."""
        await self.server.ready("")
        self.coordinator.ready()


@dataclass(frozen=True)
class Asked:
    """The options that matter here."""

    engine: EngineConfig
    local: LocalConfig
    transfer: TransferConfig
    log: LogConfig


def with_ray_address(argv: Sequence[str]) -> list[str]:
    """`--ray` alone is `--ray local`."""
    words: list[str] = []
    for word, after in zip(argv, [*argv[1:], "-"], strict=True):
        words.append(word)
        if word == "--ray" and after.startswith("-"):
            words.append(LOCAL_RAY)
    return words


def ray_workers(asked: Asked, server: HttpServer, folder: Path) -> RayWorkers:
    """Nothing is started yet. The coordinator keeps its state in `folder`."""
    engine, local = asked.engine, asked.local
    socket = folder / "coordinator.sock"
    pools = _pools(engine, local)
    if local.ray == LOCAL_RAY:
        engine = shared(engine, len(local.roles))
    if Path(engine.model).exists():
        engine = replace(engine, model=str(Path(engine.model).resolve()))
    fleet = {
        # the next server on this port takes over what a killed one has left
        "fleet": f"serve-{server.config.port}",
        "ray": local.ray,
        "listen": f"unix:{socket}",
        "state_dir": str(folder / "coordinator"),
        "models": [{"name": server.model_name, "engine": to_mapping(engine), "pools": pools}],
        "transfer": to_mapping(asked.transfer),
    }
    coordinator = Supervisor(
        options={"fleet": fleet, **to_mapping(asked.log)},
        socket=socket,
        patience=Patience(stop=engine.drain_timeout_s + END_GRACE_S),
        command=(sys.executable, "-P", "-m", "quire.coordinator"),
        name="the coordinator",
    )
    return RayWorkers(coordinator, f"unix:{socket}")


def _pools(engine: EngineConfig, local: LocalConfig) -> Sequence[Mapping[str, Any]]:
    """One pool for each role; on a Ray of our own they share this machine's CPUs."""
    roles = local.roles
    gpus = engine.tensor_parallel_size if engine.device == "cuda" else 0
    cpus = float(engine.num_threads or 1)
    if local.ray == LOCAL_RAY:
        # Ray counts in ten-thousandths
        cpus = int(10_000 * len(os.sched_getaffinity(0)) / len(roles)) / 10_000
    return [
        {"name": role, "role": role, "replicas": roles.count(role), "cpus": cpus, "gpus": gpus}
        for role in dict.fromkeys(roles)
    ]
