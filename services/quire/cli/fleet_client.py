"""What `quire status`, `scale` and `role` share: whom they ask, and how they fail."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from quire.config.cluster import ClusterConfig
from quire.config.flags import parse
from quire.config.fleet_client import FleetClientConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from quire.config.flags import Command
    from quire.coordinator.client import CoordinatorClient

FAILED = 1


OWNERS = (FleetClientConfig, ClusterConfig)


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before the first flag, and the rest."""
    first = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    return list(argv[:first]), list(argv[first:])


def ask(
    command: Command,
    flags: Sequence[str],
    question: Callable[[CoordinatorClient], Awaitable[None]],
) -> int:
    """Have the coordinator that the flags name do something; returns the exit code."""
    resolved = parse(command, flags, os.environ)
    address = resolved.get(FleetClientConfig).coordinator

    async def run() -> int:
        from quire.cluster.rpc import Cluster
        from quire.coordinator.client import CoordinatorClient, CoordinatorError

        try:
            cluster = Cluster(resolved.get(ClusterConfig))
            await question(CoordinatorClient(address, cluster))
        except (CoordinatorError, OSError) as error:
            print(f"{command.prog}: error: {error}", file=sys.stderr)
            return FAILED
        return 0

    return asyncio.run(run())
