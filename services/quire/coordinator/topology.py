"""Which pods to connect to, with the epoch that orders what is said about it. No I/O.

An epoch is (term, version). A coordinator that takes over has a higher term than all before it,
and raises the version with each change. Whoever reads topologies refuses an older one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Epoch(NamedTuple):
    """Order of topologies."""

    term: int
    version: int


@dataclass(frozen=True, order=True)
class Pod:
    """One replica that gateways and routers shall connect to."""

    name: str
    address: str
    pool: str
    model: str


@dataclass(frozen=True)
class Topology:
    """All pods of a fleet, by name."""

    fleet: str
    epoch: Epoch
    pods: tuple[Pod, ...] = ()

    def __post_init__(self) -> None:
        names = [pod.name for pod in self.pods]
        assert names == sorted(set(names)), "pods are sorted, each there once"

    def with_pods(self, pods: Iterable[Pod]) -> Topology:
        """The next version, or this one when nothing changes."""
        ordered = tuple(sorted(pods))
        if ordered == self.pods:
            return self
        return replace(
            self, pods=ordered, epoch=self.epoch._replace(version=self.epoch.version + 1)
        )

    def in_term(self, term: int) -> Topology:
        """The same pods, as the coordinator of a later term says it."""
        assert term > self.epoch.term, "terms grow"
        return replace(self, epoch=Epoch(term, 0))


def next_term(known: Iterable[int], now_s: float) -> int:
    """A term above all known ones, and at least the time, in seconds since 1970.

    The time makes terms grow also when every record of the earlier ones is lost.
    """
    return max(int(now_s), *(term + 1 for term in known), 1)
