"""`python -m quire.router`: a router process as `quire serve --routers N` starts it.

The first line of stdin is a JSON object: {"router": {...RouterConfig}, "listen": "unix:/path",
"pods": {"name": "address"}, "cluster": {...ClusterConfig}}. The process ends when stdin closes, so
it never outlives its parent. See `quire router` for one that stands alone.
"""

from __future__ import annotations

import asyncio
import json
import sys

from quire.cluster.parent import parent_gone
from quire.config.address import is_local
from quire.config.base import from_mapping
from quire.config.cluster import ClusterConfig
from quire.config.exit_codes import CANNOT_SERVE
from quire.config.router import RouterConfig
from quire.router.server import RouterOptions, serve
from quire.telemetry.logging import configure


def main() -> int:
    """Read the options, serve, return the exit code."""
    try:
        raw = json.loads(sys.stdin.readline())
        options = RouterOptions(
            config=from_mapping(RouterConfig, raw["router"]),
            listen=_check_listen(raw["listen"]),
            pods=dict(raw["pods"]),
            cluster=from_mapping(ClusterConfig, raw.get("cluster", {})),
        )
    except (ValueError, TypeError, KeyError) as error:
        print(f"quire: error: bad router options: {error}", file=sys.stderr)
        return CANNOT_SERVE
    configure(raw.get("log_level", "info"), raw.get("log_format", "text"))
    return asyncio.run(serve(options, parent_gone))


def _check_listen(address: str) -> str:
    if not is_local(address):
        raise ValueError(f"listen address {address!r} must be unix:/path or loopback")
    return address


if __name__ == "__main__":
    sys.exit(main())
