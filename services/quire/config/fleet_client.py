"""Which fleet a process asks about."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import check_address
from quire.config.base import check_fields
from quire.config.fleet import DEFAULT_COORDINATOR
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class FleetClientConfig:
    """Which fleet to talk to."""

    coordinator: str = option(DEFAULT_COORDINATOR, "coordinator")
    """gRPC address of the fleet's coordinator."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_address(self.coordinator)
