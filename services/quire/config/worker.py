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
    """Address under which other processes reach it; the one it listens on by default."""
    worker_name: str | None = option(None, "worker")
    """Name in logs and transfers, stable over restarts; the host's name by default."""
    role: str = option("both", "worker", choices=ROLES)
    """What it is for while others can do the rest: prefill, decode or both. A routing weight: every
    worker can do everything."""
    served_model_name: str | None = option(None, "worker")
    """The model's name in metrics; its path or id by default."""
    http_port: int = option(0, "worker")
    """Port for /metrics, /healthz and /readyz over HTTP, on the host of --listen; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_listen(self.listen, self.http_port)
        if self.advertise is not None:
            check_address(self.advertise)


def check_listen(listen: str, http_port: int) -> None:
    """Raises ValueError naming the option."""
    try:
        check_address(listen)
    except ValueError as error:
        raise ValueError(f"listen: {error}") from None
    check_port("http_port", http_port)
