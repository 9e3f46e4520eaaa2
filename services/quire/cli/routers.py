"""The router processes of one server. Requests go on without them, so their loss ends nothing."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.cli.probe import Probe
from quire.cli.supervisor import Supervisor
from quire.config.cluster import ClusterConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

READY_POLL_S = 0.5
COMMAND = (sys.executable, "-P", "-m", "quire.router")


@dataclass(frozen=True)
class Routers:
    """Several routers of the same workers; none is a number too."""

    supervisors: tuple[Supervisor, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses, in the order of their numbers."""
        return tuple(f"unix:{supervisor.socket}" for supervisor in self.supervisors)

    async def run(self) -> None:
        """Keep them alive until `stop`."""
        watching = [asyncio.create_task(_watch_ready(s)) for s in self.supervisors]
        try:
            codes = await asyncio.gather(*(supervisor.run() for supervisor in self.supervisors))
            for supervisor, code in zip(self.supervisors, codes, strict=True):
                if code:
                    logger.error("%s is given up (exit code %d)", supervisor.name, code)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def stop(self) -> None:
        """End them all. `run` returns afterwards."""
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))

    def kill(self) -> None:
        """End them now."""
        for supervisor in self.supervisors:
            supervisor.kill()


def routers_of(count: int, folder: Path, options: Mapping[str, Any]) -> Routers:
    """Routers that listen in `folder`, see `quire.router`. Nothing is started yet."""
    sockets = [folder / f"router-{number}.sock" for number in range(count)]
    return Routers(
        tuple(
            Supervisor(
                options={**options, "listen": f"unix:{socket}"},
                socket=socket,
                command=COMMAND,
                name=f"router {number}",
                probe=Probe(f"unix:{socket}", ClusterConfig(**options["cluster"])),
            )
            for number, socket in enumerate(sockets)
        )
    )


async def _watch_ready(supervisor: Supervisor) -> None:
    """Tell the supervisor when its router can be called, so that dying later is no failed start."""
    import grpc

    async with grpc.aio.insecure_channel(f"unix:{supervisor.socket}") as channel:
        while True:
            await channel.channel_ready()
            supervisor.ready()
            await asyncio.sleep(READY_POLL_S)
