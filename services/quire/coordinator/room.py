"""Whether the cluster can hold a fleet, asked before anything is placed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.coordinator import assignments, capacity
from quire.coordinator.model_files import missing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.config.fleet import Fleet
    from quire.coordinator.placement import RayCluster


class Refused(Exception):
    """A request that cannot be granted; the message says what to change."""


class NoRoom(Refused):
    """The nodes that there are do not hold every replica."""


async def check_room(fleet: Fleet, cluster: RayCluster, numbers: Mapping[str, int]) -> None:
    """With these numbers of replicas. Raises NoRoom; Refused when a node has not got a model."""
    nodes = await cluster.nodes()
    lacking = capacity.shortage(nodes, assignments.demands(fleet, numbers))
    if lacking is not None:
        raise NoRoom(lacking)
    try:
        paths = list(assignments.model_paths(fleet))
    except ValueError as error:
        raise Refused(str(error)) from None
    for path, pool in paths:
        if not numbers[pool.name]:
            continue
        hosts = await cluster.missing(path, pool.labels)
        if hosts:
            raise Refused(missing(path, hosts[0], pool.name))
