"""Options of a host of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import check_address, check_port
from quire.config.base import check_fields
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """What this host offers to Ray."""

    join: str | None = option(None, "node")
    """host:port of Ray's head; without it this node is the head."""
    ray_port: int = option(6379, "node")
    """Port of the head, where this node is it."""
    dashboard: bool = option(False, "node")
    """Ray's dashboard on the head, at port 8265 of `address`, with the HTTP API that KubeRay's
    RayService calls. It answers who knows Ray's token, and runs whatever those send."""
    address: str | None = option(None, "node")
    """Address of this host for other nodes, Ray's guess by default."""
    node_name: str | None = option(None, "node")
    """Name under which others reach this host's engines, where certificates are for names; its
    address by default."""
    cpus: int = option(0, "node")
    """CPUs that replicas may take; 0 keeps those without GPUs away."""
    gpus: int = option(0, "node")
    """GPUs that replicas may take."""
    node_label: tuple[str, ...] = option((), "node")
    """KEY=VALUE that pools find this node by; several are allowed."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.join is not None:
            try:
                check_address(self.join)
            except ValueError as error:
                raise ValueError(f"join: {error}") from None
            if self.dashboard:
                raise ValueError("dashboard: only the head has one, and join makes this no head")
        check_port("ray_port", self.ray_port)
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for label in self.node_label:
            if not all(label.partition("=")[::2]):
                raise ValueError(f"node_label must be KEY=VALUE, not {label!r}")
