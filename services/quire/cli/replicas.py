"""The worker processes of one server: each with its socket, supervisor, and a watch on its start.

Whatever their roles, each can do everything: the server is there for its clients as long as one of
them is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quire.cli.probe import Probe
from quire.cli.startup import Quiet, StartupWatch, display_for
from quire.cli.supervisor import Supervisor
from quire.config.base import to_mapping
from quire.config.cluster import ClusterConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from quire.config.engine import EngineConfig

logger = logging.getLogger(__name__)

SHARED_MEMORY = 0.5
"""Share of the memory that the replicas' KV caches take together when no size is given."""


@dataclass(frozen=True)
class Replicas:
    """Several workers of the same model."""

    supervisors: tuple[Supervisor, ...]

    @property
    def addresses(self) -> dict[str, str]:
        """Name -> gRPC address, in the order of their numbers."""
        return {s.options["worker"]: f"unix:{s.socket}" for s in self.supervisors}

    async def run(self) -> int:
        """Keep them alive until `stop`; returns 0 then, and else why the last was given up."""
        codes = await asyncio.gather(*(supervisor.run() for supervisor in self.supervisors))
        return codes[-1]

    async def stop(self) -> None:
        """End them all. `run` returns afterwards."""
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))

    def kill(self) -> None:
        """End them now."""
        for supervisor in self.supervisors:
            supervisor.kill()

    def watches(
        self, on_ready: Callable[[str], Awaitable[None]], cluster: ClusterConfig
    ) -> list[StartupWatch]:
        """What follows each start; the first worker's is shown, the others' are alike."""
        return [
            StartupWatch(
                f"unix:{supervisor.socket}",
                display_for() if number == 0 else Quiet(),
                _then(supervisor.ready, on_ready),
                cluster,
            )
            for number, supervisor in enumerate(self.supervisors)
        ]


def replicas_of(
    engine: EngineConfig,
    roles: Sequence[str],
    folder: Path,
    common: Mapping[str, Any],
    on_restart: Callable[[], None],
) -> Replicas:
    """Workers that share this machine, listening in `folder`. Nothing is started yet.

    `common` are options beside the engine's, see `quire.worker`.
    """
    token = common.get("transfer", {}).get("cluster_token")
    cluster = ClusterConfig(cluster_token=token)
    options = {"engine": to_mapping(shared(engine, len(roles))), **common}
    return Replicas(
        tuple(
            Supervisor(
                options=options
                | {"listen": f"unix:{socket}", "number": number, "role": role}
                | {"worker": f"{role}-{number}"},
                socket=socket,
                on_restart=on_restart,
                probe=Probe(f"unix:{socket}", cluster),
            )
            for number, role in enumerate(roles)
            for socket in [folder / f"worker-{number}.sock"]
        )
    )


def shared(engine: EngineConfig, count: int) -> EngineConfig:
    """The options of one of `count` engines on this machine: its share of CPUs and memory."""
    if count == 1:
        return engine
    if engine.num_threads is None:
        engine = replace(engine, num_threads=max(1, len(os.sched_getaffinity(0)) // count))
    if engine.memory_utilization is None and engine.kv_cache_memory_bytes is None:
        engine = replace(engine, memory_utilization=SHARED_MEMORY / count)
    return engine


def _then(
    first: Callable[[], None], second: Callable[[str], Awaitable[None]]
) -> Callable[[str], Awaitable[None]]:
    async def both(model: str) -> None:
        first()
        await second(model)

    return both
