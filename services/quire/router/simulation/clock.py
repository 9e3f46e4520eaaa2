"""Virtual time: a heap of what happens when."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(order=True, slots=True)
class Timer:
    """Something that will happen, unless cancelled."""

    at: float
    ticket: int
    action: Callable[[], None] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)


class VirtualClock:
    """Runs actions in order of time; those of one time in the order they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[Timer] = []
        self._ticket = itertools.count()

    def __call__(self) -> float:
        """Seconds since the start."""
        return self.now

    def at(self, time: float, action: Callable[[], None]) -> Timer:
        """Do it then."""
        timer = Timer(max(time, self.now), next(self._ticket), action)
        heapq.heappush(self._heap, timer)
        return timer

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._heap:
            timer = heapq.heappop(self._heap)
            if not timer.cancelled:
                self.now = timer.at
                timer.action()
