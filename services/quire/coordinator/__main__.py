"""`python -m quire.coordinator`: a coordinator as `quire serve --ray` starts it; see `quire up`.

The first line of stdin is a JSON object: {"fleet": {...a fleet file's content}, "log_level": "...",
"log_format": "..."}. The fleet ends when stdin closes: it lives with the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from quire.cluster.parent import parent_gone
from quire.config.fleet import fleet_from
from quire.coordinator.joining import prepare_environment
from quire.telemetry.logging import configure


def main() -> int:
    """Read the options, serve, return the exit code."""
    try:
        raw = json.loads(sys.stdin.readline())
        fleet = fleet_from(raw["fleet"])
    except (ValueError, TypeError, KeyError) as error:
        print(f"quire: error: bad coordinator options: {error}", file=sys.stderr)
        return 2
    configure(raw.get("log_level", "info"), raw.get("log_format", "text"))
    prepare_environment()
    from quire.coordinator.server import serve

    return asyncio.run(serve(fleet, ended=parent_gone, ends_with_fleet=True))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for Ray's head would keep the interpreter
