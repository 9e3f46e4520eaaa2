"""Whether a cluster has room for a fleet, said before anything is placed. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

EPSILON = 1e-6
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True)
class Node:
    """A host, as Ray knows it."""

    id: str
    host: str
    cpus: float
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    def matches(self, labels: Mapping[str, str]) -> bool:
        """It has all these labels."""
        return all(self.labels.get(key) == value for key, value in labels.items())


@dataclass(frozen=True)
class Demand:
    """What the replicas of a pool need, each on one host where it fits there."""

    pool: str
    replicas: int
    cpus: float
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    """Of a replica: what is too large for any host goes over several, as many ranks on each."""

    def share(self, hosts: int) -> dict[str, float]:
        """Ray's resources of a replica on each of its hosts."""
        amounts = (("CPU", self.cpus / hosts), ("GPU", self.gpus / hosts))
        return {kind: amount for kind, amount in amounts if amount}


def hosts_of(nodes: Sequence[Node], demand: Demand) -> int:
    """Over how many hosts a replica goes: the fewest that could hold it if they held nothing else,
    1 if none could."""
    able = [node for node in nodes if node.matches(demand.labels)]
    for hosts in range(1, demand.ranks + 1):
        if demand.ranks % hosts or demand.gpus % hosts:
            continue
        share = demand.share(hosts)
        if sum(_Left(node, node.cpus, node.gpus).take(share) for node in able) >= hosts:
            return hosts
    return 1


@dataclass
class _Left:
    node: Node
    cpus: float
    gpus: float

    def take(self, share: Mapping[str, float]) -> bool:
        cpus, gpus = share.get("CPU", 0.0), share.get("GPU", 0.0)
        if self.cpus + EPSILON < cpus or self.gpus + EPSILON < gpus:
            return False
        self.cpus -= cpus
        self.gpus -= gpus
        return True


def shortage(nodes: Sequence[Node], demands: Iterable[Demand]) -> str | None:
    """What to change when the demands do not fit together, else None.

    The largest replicas go first, each to the first node with room. So what is accepted fits; a
    mixture of odd sizes may be refused though some other order would fit.
    """
    left = [_Left(node, node.cpus, node.gpus) for node in nodes]
    for demand in sorted(demands, key=lambda d: (-d.gpus, -d.cpus, -len(d.labels), d.pool)):
        hosts = hosts_of(nodes, demand)
        share, able = demand.share(hosts), [x for x in left if x.node.matches(demand.labels)]
        shares = 0
        while shares < hosts * demand.replicas and any(one.take(share) for one in able):
            shares += 1
        if shares < hosts * demand.replicas:
            return _explain(demand, shares // hosts, nodes)
    return None


def _explain(demand: Demand, placed: int, nodes: Sequence[Node]) -> str:
    able = [node for node in nodes if node.matches(demand.labels)]
    label = "".join(f" labelled {key}={value}" for key, value in demand.labels.items())
    each = _amount(demand.cpus, demand.gpus)
    if not able:
        return (
            f"pool {demand.pool}: no node is{label}; start one with `ray start --labels`, or "
            "change the pool's node-label"
        )
    have = ", ".join(f"{node.host} ({_amount(node.cpus, node.gpus)})" for node in able)
    return (
        f"pool {demand.pool}: {demand.replicas} replicas of {each} are wanted, there is room for "
        f"{placed} beside the other pools on the nodes{label}: {have}; lower the number of "
        f"replicas to {placed}, or add nodes"
    )


def _amount(cpus: float, gpus: float) -> str:
    parts = [f"{gpus:g} GPU"] if gpus else []
    return " and ".join([f"{cpus:g} CPU", *parts])
