"""One pod of the fleet, as far as the coordinator knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.coordinator.reconcile import State

if TYPE_CHECKING:
    import asyncio

    from quire.coordinator.supervisor import Report


@dataclass
class Replica:
    """One pod, as far as it is known."""

    report: Report | None = None
    answers: bool = False
    """Its supervisor answered last time."""
    problem: str = ""
    """Why the latest action failed."""
    leaving: bool = False
    published: str = ""
    """Address in the topology."""
    job: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """As shown and decided upon."""
        if self.leaving:
            return State.STOPPING
        if self.report is None:
            return State.UNREACHABLE if self.published else State.PLACING
        return self.report.state if self.answers else State.UNREACHABLE
