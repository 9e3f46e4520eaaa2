"""A cluster without Ray: what is placed becomes ready when told to."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from quire.coordinator.capacity import Node
from quire.coordinator.placement import HeadAway, Unreachable
from quire.coordinator.reconcile import State
from quire.coordinator.supervisor import Report

_ports = itertools.count(9000)


class FakeRayCluster:
    """Has the methods of `RayCluster`, and outlives coordinators as a cluster does."""

    def __init__(self, *nodes: Node) -> None:
        self.node_list = list(nodes) or [Node("n0", "10.0.0.1", cpus=4)]
        self.reports: dict[str, Report] = {}
        self.silent: set[str] = set()
        self.leader: dict[str, Any] | None = None
        self.terms: set[int] = set()
        self.absent: dict[str, list[str]] = {}
        """Path -> hosts without it."""
        self.refusing: dict[str, str] = {}
        """Pod -> why its engine cannot serve."""
        self.head_is_away = False
        self.log: list[tuple[str, str]] = []
        self.address = self.host = self.dashboard_url = ""

    def _ask_head(self) -> None:
        if self.head_is_away:
            raise HeadAway("Ray's head does not answer")

    async def nodes(self) -> list[Node]:
        self._ask_head()
        return self.node_list

    async def find(self) -> set[str]:
        self._ask_head()
        return set(self.reports)

    async def place(self, assignment, demand, near) -> None:
        self._ask_head()
        self.log.append(("place", assignment.pod))
        number = next(_ports)
        refusal = self.refusing.get(assignment.pod, "")
        self.reports[assignment.pod] = Report(
            State.REFUSED if refusal else State.READY,
            assignment.digest,
            assignment.role,
            refusal,
            address=f"10.0.0.1:{number}",
            host="10.0.0.1",
            pid=number,
        )

    async def remove(self, pod: str) -> None:
        self._ask_head()
        self.log.append(("remove", pod))
        self.reports.pop(pod, None)

    async def missing(self, path: str, labels) -> list[str]:
        return self.absent.get(path, [])

    async def read_leader(self):
        self._ask_head()
        return self.leader

    async def claim(self, leader) -> bool:
        if leader["term"] in self.terms:
            return False
        self.terms.add(leader["term"])
        self.leader = leader
        return True

    def knows(self, pod: str) -> bool:
        return pod in self.reports

    async def report(self, pod: str) -> Report:
        if pod in self.silent:
            raise Unreachable("no answer")
        return self.reports[pod]

    async def set_role(self, pod: str, term: int, role: str) -> None:
        if pod in self.silent:
            raise Unreachable("no answer")
        self.reports[pod] = replace(self.reports[pod], role=role)

    async def stop(self, pod: str, term: int) -> None:
        if pod in self.silent:
            raise Unreachable("no answer")
        self.log.append(("stop", pod))

    async def is_stopped(self, pod: str) -> bool:
        return True
