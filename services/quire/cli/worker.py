"""`quire worker [MODEL]`: one engine behind gRPC, as a pod runs it."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from quire.cli.standalone import require_token, run_alone
from quire.config.address import host_of
from quire.config.cluster import ClusterConfig
from quire.config.engine import EngineConfig
from quire.config.flags import Command, UsageError, parse
from quire.config.logs import LogConfig
from quire.config.transfer import TransferConfig
from quire.config.worker import WorkerConfig
from quire.telemetry.logging import configure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.config.resolve import Resolved
    from quire.engine.parallel.spread import Spread

COMMAND = Command(
    prog="quire worker",
    summary="Run one engine, for gateways, routers and other workers to reach over gRPC.",
    owners=(EngineConfig, WorkerConfig, TransferConfig, LogConfig),
    positional="model",
    reads_environment=True,
)


def run(argv: Sequence[str]) -> int:
    """Run the worker until a signal or its failure; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    engine, worker = resolved.get(EngineConfig), resolved.get(WorkerConfig)
    require_token(COMMAND, worker.listen, resolved.get(TransferConfig))
    transfer = _transfer(resolved)
    spread = _spread(resolved, transfer)
    if worker.node_rank and spread is not None:
        from quire.engine.parallel import node

        log = resolved.get(LogConfig)
        configure(log.log_level, "json" if log.log_format == "json" else "text")
        return node.run(spread, worker.node_rank, engine.drain_timeout_s)

    async def serve() -> int:
        from quire.worker.disaggregation import TransferOptions
        from quire.worker.server import WorkerOptions
        from quire.worker.server import serve as serve_worker
        from quire.worker.standing import Role

        name = worker.worker_name or socket.gethostname()
        return await serve_worker(
            WorkerOptions(
                engine=engine,
                listen=worker.listen,
                served_model_name=worker.served_model_name or engine.model,
                transfer=TransferOptions(name, transfer, Role(worker.role)),
                label=name,
                cluster=transfer,
                advertise=worker.advertise,
                http_port=worker.http_port,
                ends_with_stdin=False,
                spread=spread,
            )
        )

    code = run_alone(resolved.get(LogConfig), serve())
    sys.stdout.flush()
    sys.stderr.flush()
    # A stalled engine thread would keep the interpreter from ending.
    os._exit(code)


def _spread(resolved: Resolved, transfer: TransferConfig) -> Spread | None:
    """None for a replica of one host. Raises UsageError."""
    engine, worker = resolved.get(EngineConfig), resolved.get(WorkerConfig)
    if worker.nnodes == 1:
        return None
    from quire.engine.parallel.spread import Spread

    require_token(COMMAND, f"{worker.master_addr}:{worker.master_port}", transfer)
    cluster = ClusterConfig(**{f.name: getattr(transfer, f.name) for f in fields(ClusterConfig)})
    known_as = transfer.kv_advertised_host if worker.node_rank else None
    spread = Spread(worker.nnodes, worker.master_addr, worker.master_port, cluster, known_as)
    try:
        spread.ranks_of(0, engine.tensor_parallel_size)
    except ValueError as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    return spread


def _transfer(resolved: Resolved) -> TransferConfig:
    """KV blocks go the way the gRPC address goes, where nothing else is said."""
    worker, transfer = resolved.get(WorkerConfig), resolved.get(TransferConfig)
    host = host_of(worker.listen)
    known_as = host_of(worker.advertise) if worker.advertise is not None else None
    if host is not None and "kv_host" not in resolved.origins:
        transfer = replace(transfer, kv_host=host)
    if known_as is not None and transfer.kv_advertised_host is None:
        transfer = replace(transfer, kv_advertised_host=known_as)
    return transfer
