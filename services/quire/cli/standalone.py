"""What the commands share that run one process of a cluster."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from quire.config.address import is_local
from quire.config.flags import UsageError
from quire.telemetry.logging import configure

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from quire.config.cluster import ClusterConfig
    from quire.config.discovery import DiscoveryConfig
    from quire.config.flags import Command
    from quire.config.logs import LogConfig


def require_token(command: Command, listen: str, cluster: ClusterConfig) -> None:
    """Raises UsageError when others could call the process without proving who they are."""
    if not (is_local(listen) or cluster.cluster_token):
        message = f"listen {listen} is open to the network: a cluster_token is needed"
        raise UsageError(command.prog, message)


def require_pod(command: Command, discovery: DiscoveryConfig) -> None:
    """Raises UsageError when Services are given and this is no pod."""
    if discovery.kubernetes_service:
        from quire.router.endpoint_slices import own_namespace

        try:
            own_namespace()
        except OSError as error:
            raise UsageError(command.prog, f"kubernetes_service: {error}") from None


def run_alone(log: LogConfig, serving: Coroutine[Any, Any, int]) -> int:
    """Run a process's service to its end; returns the exit code."""
    configure(log.log_level, "json" if log.log_format == "json" else "text")
    return asyncio.run(serving)


async def never() -> None:
    """Nobody's child: only a signal ends it."""
    await asyncio.Event().wait()
