"""Keeps another host's part of a replica whose ranks span hosts: a supervisor beside rank 0's.

    (rank 0's host known) ─▶ started ──rank 0 comes up──▶ ranks run ──gang ends──▶ started again
                                └────── rank 0 has moved: ended, started again ──┘

Rank 0's supervisor is asked where rank 0 meets the others, each time: neither needs the coordinator
to find the other after a restart. What runs here is `quire.engine.parallel.node`.
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


class Companion(Supervisor):
    """`ask` gives the report of rank 0's supervisor, None while it does not answer."""

    def __init__(
        self, assignment: Assignment, node_host: str, ask: Callable[[], Report | None]
    ) -> None:
        self._ask = ask
        super().__init__(assignment, node_host)

    def _start(self) -> Engine:
        """Once rank 0's host is known. Raises OSError."""
        before = files.read_json(self._folder / files.ENGINE) or {}
        while not self._stopping.is_set():
            if master := self._master():
                return self._launch({}, "", before.get("gpus"), master)
            time.sleep(ASK_S)
        raise OSError("told to end before rank 0 was found")

    def _master(self) -> str:
        """Where rank 0 meets the others, empty while that is not known."""
        report = self._ask()
        return "" if report is None else report.master

    async def _watch(self, engine: Engine) -> float:
        """Until its ranks end or shall end, or rank 0 has moved; returns for how long they ran."""
        self._report = replace(self._report, state=State.READY)
        began = asked = time.monotonic()
        while engine.is_alive and not self._stopping.is_set():
            files.renew_lease(self._folder)
            if time.monotonic() - asked >= ASK_S:
                master = await asyncio.to_thread(self._master)
                asked = time.monotonic()
                if master not in ("", engine.master):
                    engine_process.kill(engine)  # of a gang that rank 0's supervisor has given up
            await asyncio.sleep(WATCH_S)
        return time.monotonic() - began
