"""Supervisors inside Ray's worker processes, and the placement groups they are in.

Functions ask Ray's head and may wait as long as that is away.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.coordinator import capacity
from quire.coordinator.capacity import Node
from quire.coordinator.companion import Companion
from quire.coordinator.joining import NODE_NAME
from quire.coordinator.supervisor import Supervisor

if TYPE_CHECKING:
    from quire.coordinator.capacity import Demand
    from quire.coordinator.supervisor import Assignment, Report

NAMESPACE = "quire"
LEADER_TIMEOUT_S = 2.0


def _own_host() -> str:
    import ray

    util: Any = ray.util
    return str(util.get_node_ip_address())


class SupervisorActor(Supervisor):
    """A supervisor inside a Ray worker process."""

    def __init__(self, assignment: Assignment, name: str) -> None:
        known_as = os.environ.get(NODE_NAME, "")  # the raylet's own environment is ours too
        super().__init__(assignment, _own_host(), known_as)


class CompanionActor(Companion):
    """A companion inside a Ray worker process, of the supervisor with that name."""

    def __init__(self, assignment: Assignment, name: str) -> None:
        self._leader: Any = None
        super().__init__(assignment, _own_host(), partial(self._ask_leader, name))

    def _ask_leader(self, name: str) -> Report | None:
        import ray

        known: Any = ray
        try:
            if self._leader is None:
                self._leader = ray.get_actor(name, NAMESPACE)
            report: Report = known.get(self._leader.report.remote(), timeout=LEADER_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayError):  # it is not there yet, or silent
            return None
        return report


def all_nodes() -> list[Node]:
    """Hosts that live."""
    import ray

    known: Any = ray
    return [
        Node(
            id=str(node["NodeID"]),
            host=str(node["NodeManagerAddress"]),
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            labels=dict(node.get("Labels") or {}),
        )
        for node in known.nodes()
        if node["Alive"]
    ]


def group(name: str) -> Any:
    """A placement group by name, None when there is none."""
    from ray.util.placement_group import get_placement_group

    try:
        return get_placement_group(name)
    except ValueError:
        return None


def new_group(name: str, demand: Demand, near: str) -> Any:
    """A placement group for one replica."""
    from ray.util.placement_group import placement_group

    nodes = all_nodes()
    hosts = capacity.hosts_of(nodes, demand)
    before = [node.id for node in nodes if node.host == near and node.matches(demand.labels)]
    return placement_group(
        [demand.share(hosts)] * hosts,
        strategy="STRICT_PACK" if hosts == 1 else "PACK",
        name=name,
        lifetime="detached",
        _soft_target_node_id=before[0] if before and hosts == 1 else None,
        bundle_label_selector=[dict(demand.labels)] * hosts if demand.labels else None,
    )


def start_again(actor: Any) -> None:
    """Have Ray end a supervisor's process, if there is one, and start it anew; it adopts its
    engine."""
    import ray

    ray.kill(actor, no_restart=False)


def supervisor(group: Any, name: str, args: tuple[Assignment, str]) -> Any:
    """The supervisor of this name in the group's bundle of its host, started unless it is there."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    node = args[0].node
    actor: Any = ray.remote(CompanionActor if node else SupervisorActor)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=4,
        num_cpus=0,
        num_gpus=group.bundle_specs[node].get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, node),
    ).remote(*args)
