"""Steps that were planned and whose results are not here yet, and the blocks they may still use.

Without async scheduling a step lands before the next is planned. With it one is planned ahead:

    planned   n        n + 1          n + 2
    landed             n              n + 1
    a block that step n's results free is still read and written by n + 1, and goes back when that
    one has landed

Steps run in the order they were planned, so another step could have a freed block at once. What
writes blocks beside steps (KV transfer) could not: hence the wait.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.engine.kv.pool import BlockPool
    from quire.engine.scheduler.batch import ScheduledStep


class Flight:
    """The steps under way, oldest first. Every block that a step may use is released through it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._steps: deque[ScheduledStep] = deque()
        self._released: deque[tuple[ScheduledStep, Sequence[int]]] = deque()
        """Blocks, and the newest step that may use them."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> ScheduledStep | None:
        """The step planned last, if it is under way."""
        return self._steps[-1] if self._steps else None

    def begin(self, step: ScheduledStep) -> None:
        """A step was planned: it will run."""
        self._steps.append(step)

    def land(self, step: ScheduledStep) -> None:
        """The oldest step is complete."""
        if self._steps.popleft() is not step:
            raise AssertionError("steps land in the order they were planned")
        while self._released and self._released[0][0] is step:
            self._pool.release(self._released.popleft()[1])

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, in chain order, once no step under way may use them."""
        if self._steps:
            self._released.append((self._steps[-1], blocks))
        else:
            self._pool.release(blocks)
