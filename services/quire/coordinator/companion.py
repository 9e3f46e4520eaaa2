"""Keeps another host's part of a replica whose ranks span hosts: a supervisor beside rank 0's.

    (rank 0 runs) ─▶ started ──they meet──▶ ranks run ──gang ends──▶ started again
                        └── rank 0 has moved, or died: ended, started again ──┘

Rank 0's supervisor is asked where rank 0 meets the others, each time: neither needs the coordinator
to find the other after a restart. What runs here is `quire.engine.parallel.node`, which ends with
its gang by itself, unless it hangs; rank 0 notices that once they have met. Before, nobody asks
it anything, but all that it does has a time limit: that it is stopped is seen here.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from quire.coordinator import engine_process, files
from quire.coordinator.reconcile import State
from quire.coordinator.supervisor import WATCH_S, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.coordinator.engine_process import Engine
    from quire.coordinator.supervisor import Assignment, Report

ASK_S = 1.0
"""Between two questions to rank 0's supervisor."""
STOPPED_LOOKS = 10
"""After how many in a row a process that a signal has stopped is replaced."""


class Companion(Supervisor):
    """`ask` gives the report of rank 0's supervisor, None while it does not answer."""

    def __init__(
        self, assignment: Assignment, node_host: str, ask: Callable[[], Report | None]
    ) -> None:
        self._ask = ask
        super().__init__(assignment, node_host)

    def _start(self) -> Engine:
        """Once rank 0 runs. Raises OSError."""
        while not self._stopping.is_set():
            report = self._ask()
            if report is not None and report.master and report.pid:
                return self._launch({}, "", report.master, report.pid)
            time.sleep(ASK_S)
        raise OSError("told to end before rank 0 was found")

    async def _watch(self, engine: Engine) -> float:
        """Until its ranks end or shall end, or rank 0 has moved; returns for how long they ran."""
        self._report = replace(self._report, state=State.READY)
        self._proven = engine.digest  # what rank 0 refuses is not for good: it may be upgraded
        began = asked = time.monotonic()
        stopped = 0
        while engine.is_alive and not self._stopping.is_set():
            files.renew_lease(self._folder)
            if time.monotonic() - asked >= ASK_S:
                stopped = stopped + 1 if files.is_stopped(engine.process) else 0
                report = await asyncio.to_thread(self._ask)
                asked = time.monotonic()
                is_left = report is not None and _is_another(report, engine)
                if is_left or stopped == STOPPED_LOOKS:
                    engine_process.kill(engine)
            await asyncio.sleep(WATCH_S)
        return time.monotonic() - began


def _is_another(report: Report, engine: Engine) -> bool:
    """Rank 0 is not the one that the engine's part here was started beside."""
    has_moved = report.master not in ("", engine.master)
    is_replaced = bool(report.pid and engine.leader) and report.pid != engine.leader
    return has_moved or is_replaced
