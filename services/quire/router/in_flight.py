"""Prompts on their way count as cached where they were sent, so that a burst meets in one place.

Two generations: claims go into the young one; every `ttl_s` the old one is dropped as a whole and
the young one becomes old. A claim therefore lives between one and two `ttl_s`, and nothing is kept
per claim. By then the pod's own events have confirmed it, or it was never true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.router.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST_BLOCKS = 1 << 16


class InFlight:
    """Chains sent lately, per slot. `now` is any monotonic clock, in seconds."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._young, self._old = PrefixIndex(), PrefixIndex()
        self._young.reserve(FIRST_BLOCKS)
        self._turned = 0.0

    @property
    def nbytes(self) -> int:
        """About how many bytes the claims take."""
        return self._young.nbytes + self._old.nbytes

    def claim(self, slot: int, keys: NDArray[np.uint64], now: float) -> None:
        """The chain was sent to the pod."""
        self._turn(now)
        self._young.add(slot, keys)

    def depths(self, keys: NDArray[np.uint64], num_slots: int, now: float) -> NDArray[np.int32]:
        """Leading blocks that each pod will have of a chain."""  # [blocks] -> [num_slots]
        self._turn(now)
        young = self._young.depths(keys, num_slots)
        return np.maximum(young, self._old.depths(keys, num_slots)) if len(self._old) else young

    def forget(self, slot: int) -> None:
        """The pod is gone; its slot may be given to another."""
        self._young.clear(slot)
        self._old.clear(slot)

    def _turn(self, now: float) -> None:
        if now - self._turned >= self._ttl_s:
            expired = now - self._turned >= 2 * self._ttl_s
            self._old = PrefixIndex() if expired else self._young
            self._young = PrefixIndex()
            # as many as last time, so that no decision stops to grow the table
            self._young.reserve(max(len(self._old), FIRST_BLOCKS))
            self._turned = now
