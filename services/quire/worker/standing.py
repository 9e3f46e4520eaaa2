"""What a worker is there for at the moment: its role, and whether it takes requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from enum import StrEnum

from quire.api.errors import ApiError


class Role(StrEnum):
    """What a worker is for. A routing weight and no more: every worker can do everything."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def weights(self) -> Weights:
        """The role in numbers."""
        return Weights(float(self is not Role.DECODE), float(self is not Role.PREFILL))


@dataclass(frozen=True)
class Weights:
    """Share of each kind of work the worker should get while others can do it, 0 to 1."""

    prefill: float = 1.0
    decode: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.prefill <= 1 and 0 <= self.decode <= 1):
            raise ValueError("role weights must be between 0 and 1")
        if self.prefill == self.decode == 0:
            raise ValueError("a worker must be for something: one role weight must be above 0")


class Standing:
    """Changed by Control and signals, told to routers and gateways. Lives on the event loop."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.is_sleeping = False
        self.is_over = False
        self.drain_deadline: float | None = None
        """time.monotonic() at which the worker ends whatever it still has; None: not draining."""
        self._change = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        """It takes no new requests, until it ends."""
        return self.drain_deadline is not None

    @property
    def told(self) -> tuple[Weights, bool, bool]:
        """What is sent with each load report."""
        return self.weights, self.is_draining, self.is_sleeping

    def refusal(self) -> ApiError | None:
        """Why a new request is not taken."""
        if self.is_draining:
            return ApiError("not_ready", "The worker is draining.", retry_after_s=1)
        if self.is_sleeping:
            return ApiError("not_ready", "The worker is asleep.", retry_after_s=2)
        return None

    def set_weights(self, weights: Weights) -> None:
        """Another role, from now on."""
        self.weights = weights
        self._changed()

    def drain(self, timeout_s: float) -> None:
        """Take no new requests; end in `timeout_s` at the latest, or when an earlier drain says."""
        deadline = time.monotonic() + timeout_s
        self.drain_deadline = min(deadline, self.drain_deadline or deadline)
        self._changed()

    def set_sleeping(self, sleeping: bool) -> None:
        """Fall asleep, or wake up."""
        self.is_sleeping = sleeping
        self._changed()

    async def changed(self, timeout_s: float) -> None:
        """Return with the next change, or when time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._change.wait()

    def end(self) -> None:
        """The worker ends now."""
        self.is_over = True
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
