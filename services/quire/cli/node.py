"""`quire node`: this host, or this pod, as a node of a Ray cluster."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quire.cli.up import require_ray
from quire.config.flags import Command, UsageError, parse
from quire.config.logs import LogConfig
from quire.config.node import NodeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    prog="quire node",
    summary="Keep this host in a Ray cluster, and drain its engines when it shall end.",
    owners=(NodeConfig, LogConfig),
    reads_environment=True,
    epilog="Ray's own variables are passed on: RAY_AUTH_TOKEN, which is required, and where the "
    "head keeps its state; see docs/coordinator.md.",
)
TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def run(argv: Sequence[str]) -> int:
    """Be a node until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    require_ray(COMMAND)
    config = resolved.get(NodeConfig)
    if config.dashboard and find_spec("aiohttp_cors") is None:
        raise UsageError(
            COMMAND.prog, "Ray's dashboard is not installed: pip install 'quire[rayservice]'"
        )
    if not any(os.environ.get(name) for name in TOKEN_SOURCES):
        raise UsageError(
            COMMAND.prog, "Ray runs whatever code it is sent: a secret is needed, RAY_AUTH_TOKEN"
        )
    from quire.coordinator.node import Node
    from quire.telemetry.logging import configure

    log = resolved.get(LogConfig)
    configure(log.log_level, "json" if log.log_format == "json" else "text")
    return Node(config).run()
