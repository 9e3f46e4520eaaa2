"""Options of KV transfer between pods, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import is_loopback
from quire.config.cluster import ClusterConfig
from quire.config.option import option

TRANSPORTS = ("tcp", "grpc", "nixl")


@dataclass(frozen=True, kw_only=True)
class TransferConfig(ClusterConfig):
    """How a rank is reached for KV blocks, and how long it waits. Durations in seconds."""

    kv_transports: tuple[str, ...] = option(("tcp", "grpc"), "transfer")
    """Transports for KV blocks, the preferred first: tcp, grpc, nixl (needs the rdma extra)."""
    kv_host: str = option("127.0.0.1", "transfer")
    """Address to listen on for KV blocks. Beyond loopback a cluster token is required."""
    kv_advertised_host: str | None = option(None, "transfer")
    """Name or address under which other pods reach this one; kv_host by default."""
    kv_tcp_port: int = option(0, "transfer")
    """Port of the tcp and nixl transports; 0 takes a free one."""
    kv_grpc_port: int = option(0, "transfer")
    """Port of the KvTransfer service; 0 takes a free one."""
    kv_lease_s: float = option(5.0, "transfer")
    """A transfer of which nothing is heard for this long has failed."""
    kv_heartbeat_s: float = option(0.5, "transfer")
    """A sign of life is sent on every KV link at least this often."""
    kv_heartbeat_misses: int = option(3, "transfer")
    """Heartbeats that may be missing before a link counts as broken."""
    kv_connect_timeout_s: float = option(3.0, "transfer")
    """Time to connect and to agree, per transport."""
    kv_window_bytes: int = option(32 << 20, "transfer")
    """Bytes that may be sent and not acknowledged on one link."""
    kv_landing_bytes: int = option(32 << 20, "transfer")
    """Memory per nixl link that the other side writes into (suffixes K, M, G)."""
    kv_staging_bytes: int = option(256 << 20, "transfer")
    """Pinned host memory of each rank on a GPU that KV blocks pass through, half of it in each
    direction; ranks on a CPU need none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.kv_transports:
            if name not in TRANSPORTS:
                raise ValueError(f"kv_transports must be of {', '.join(TRANSPORTS)}, not {name!r}")
        if not self.kv_transports:
            raise ValueError("kv_transports must name at least one transport")
        if not is_loopback(self.kv_host) and not self.cluster_token:
            raise ValueError(f"kv_host {self.kv_host} is not loopback: a cluster_token is needed")
        for name in ("kv_lease_s", "kv_heartbeat_s", "kv_heartbeat_misses", "kv_connect_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("kv_window_bytes", "kv_landing_bytes"):
            if getattr(self, name) < 2 << 20:
                raise ValueError(f"{name} must be at least 2 MiB, not {getattr(self, name)} bytes")
