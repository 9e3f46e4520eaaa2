"""Replicas whose engines would refuse their options again: they hold no place, and get none."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from quire.coordinator.reconcile import State
from quire.coordinator.supervisor import Report

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from quire.coordinator.reconcile import Wanted
    from quire.coordinator.replica import Replica

logger = logging.getLogger(__name__)


class Refusals(dict[str, Report]):
    """Pod -> its engine's last word."""

    def __init__(self) -> None:
        super().__init__()
        self._is_everyone = asyncio.Event()
        self._first = ""

    def note(self, replicas: Mapping[str, Replica], wanted: Mapping[str, Wanted]) -> None:
        """Take in what replicas say; forget those that are to be something else now."""
        for pod, one in replicas.items():
            if one.state is State.REFUSED and one.report is not None and pod not in self:
                logger.error("%s is refused: %s", pod, one.report.reason)
                self[pod] = one.report
        for pod, report in tuple(self.items()):
            if pod not in wanted or report.digest != wanted[pod].digest:
                del self[pod]
        if self and self.keys() == wanted.keys():
            first = min(self)
            self._first = f"{first} is refused: {self[first].reason}"
            self._is_everyone.set()

    def of_pools(self, pools: Container[str]) -> list[str]:
        """The pods of these pools."""
        return [pod for pod in self if pod.rpartition("-")[0] in pools]

    def beside(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Of so many replicas by pool, those that have a place or wait for one."""
        refused = Counter(pod.rpartition("-")[0] for pod in self)
        return {name: number - refused[name] for name, number in numbers.items()}

    async def everyone(self) -> str:
        """Return once every replica is refused, with what to change."""
        await self._is_everyone.wait()
        return self._first
