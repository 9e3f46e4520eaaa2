"""Options of a worker that runs by itself, as a pod does."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import check_address, check_port
from quire.config.base import check_fields
from quire.config.option import option

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Where the worker listens, and what others know it by."""

    listen: str = option("127.0.0.1:9000", "worker")
    """Address of its gRPC services, host:port or unix:/path. Beyond loopback a cluster token is
    required."""
    advertise: str | None = option(None, "worker")
    """Address under which other processes reach it; the one it listens on by default. Of a host
    beyond the first its host part counts, for KV blocks."""
    worker_name: str | None = option(None, "worker")
    """Name in logs and transfers, stable over restarts; the host's name by default."""
    role: str = option("both", "worker", choices=ROLES)
    """What it is for while others can do the rest: prefill, decode or both. A routing weight: every
    worker can do everything."""
    served_model_name: str | None = option(None, "worker")
    """The model's name in metrics; its path or id by default."""
    http_port: int = option(0, "worker")
    """Port for /metrics, /healthz and /readyz over HTTP, on the host of --listen; 0 for none."""

    nnodes: int = option(1, "worker")
    """Hosts that the ranks of this replica run on, as many on each: `quire worker` is started on
    every one of them, with the same options but for node_rank and advertise."""
    node_rank: int = option(0, "worker")
    """This host among them. Host 0 serves; the others run ranks for it and end with it."""
    master_addr: str = option("127.0.0.1", "worker")
    """Name or address of host 0, as the other hosts reach it."""
    master_port: int = option(29501, "worker")
    """Port of host 0 for the other hosts."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_listen(self.listen, self.http_port)
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"node_rank must be between 0 and nnodes - 1 = {self.nnodes - 1}, not "
                f"{self.node_rank}"
            )
        if not 0 < self.master_port <= 65535:
            raise ValueError(f"master_port must be between 1 and 65535, not {self.master_port}")
        if self.advertise is not None:
            check_address(self.advertise)


def check_listen(listen: str, http_port: int) -> None:
    """Raises ValueError naming the option."""
    try:
        check_address(listen)
    except ValueError as error:
        raise ValueError(f"listen: {error}") from None
    check_port("http_port", http_port)
