"""Options of whoever looks for workers: gateways and routers."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import check_address
from quire.config.base import check_fields
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """Where workers are found that are not named one by one."""

    coordinator: str | None = option(None, "discovery")
    """gRPC address of a fleet's coordinator: its pods are used as they come and go. While it is
    away, those that were there last."""
    fleet_model: str | None = option(None, "discovery")
    """Model of the fleet to use, where it has several."""
    kubernetes_service: tuple[str, ...] = option((), "discovery")
    """Service of Kubernetes, in this pod's namespace, whose pods are used as they come and go;
    several are allowed. Its port must be called grpc."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.coordinator is not None:
            try:
                check_address(self.coordinator)
            except ValueError as error:
                raise ValueError(f"coordinator: {error}") from None
        elif self.fleet_model is not None:
            raise ValueError("fleet_model is of a fleet: it needs --coordinator")
        if self.coordinator is not None and self.kubernetes_service:
            raise ValueError("coordinator and kubernetes_service do not go together")

    @property
    def is_fixed(self) -> bool:
        """Workers are those that are named, and stay the same."""
        return self.coordinator is None and not self.kubernetes_service


NO_DISCOVERY = DiscoveryConfig()
"""Only workers that are named."""
