"""The routing policies, by name. Each module holds one: its scorer, and its pipeline in `build`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.router.policies import (
    cost,
    least_load,
    power_of_two,
    prefix,
    round_robin,
    session,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.router import RouterConfig
    from quire.router.profile import Policy

POLICIES: dict[str, Callable[[RouterConfig], Policy]] = {
    "cost": cost.build,
    "prefix": prefix.build,
    "least_load": least_load.build,
    "power_of_two": power_of_two.build,
    "round_robin": round_robin.build,
    "session": session.build,
}


def build_policy(config: RouterConfig) -> Policy:
    """The policy that the options ask for."""
    return POLICIES[config.routing_policy](config)
