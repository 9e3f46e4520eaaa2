"""`python -m quire.worker`: a worker process as `quire serve` starts it; see `quire worker`.

The first line of stdin is a JSON object: {"engine": {...EngineConfig}, "listen": "unix:/path",
"served_model_name": "...", "number": 0, "worker": "name", "role": "prefill|decode|both",
"transfer": {...TransferConfig}}. Without "transfer" no KV blocks are exchanged. The process ends
when stdin closes, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from quire.config.address import is_local
from quire.config.base import from_mapping
from quire.config.cluster import ClusterConfig
from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig


def main() -> int:
    """Read the options, serve, return the exit code."""
    line = sys.stdin.readline()
    try:
        raw = json.loads(line)
        engine = from_mapping(EngineConfig, raw["engine"])
        listen = _check_listen(raw["listen"])
        name = raw.get("served_model_name") or engine.model
        label = str(int(raw.get("number", 0)))
        kv = from_mapping(TransferConfig, raw["transfer"]) if raw.get("transfer") else None
    except (ValueError, TypeError, KeyError) as error:
        print(f"quire: error: bad worker options: {error}", file=sys.stderr)
        return 2
    from quire.telemetry.logging import configure
    from quire.worker.disaggregation import TransferOptions
    from quire.worker.server import WorkerOptions, serve
    from quire.worker.standing import Role

    role = Role(raw.get("role", "both"))
    transfer = None if kv is None else TransferOptions(raw.get("worker", listen), kv, role)
    configure(raw.get("log_level", "info"), raw.get("log_format", "text"))
    cluster = kv or ClusterConfig()
    return asyncio.run(serve(WorkerOptions(engine, listen, name, transfer, label, cluster)))


def _check_listen(address: str) -> str:
    """Only this machine: what is reached from further is started by `quire worker`."""
    if is_local(address):
        return address
    raise ValueError(f"listen address {address!r} must be unix:/path or on the loopback interface")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A stalled engine thread would keep the interpreter from ending.
    os._exit(code)
