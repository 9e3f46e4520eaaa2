"""A modelled prefix cache: what is in use stays, the rest goes least recently used, leaf first.

The same rules as the engine's block pool, without the blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class CacheChange:
    """A block came or went."""

    at: float
    block_hash: bytes
    stored: bool


class ModelCache:
    """`capacity` blocks: in use by hash, in use without one (`anonymous`), or cached."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.anonymous = 0
        self.changes: list[CacheChange] = []
        """Since somebody last took them."""
        self._uses: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        """Cached blocks nobody uses, least recently used first."""

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return self.capacity - self.anonymous - len(self._uses) - len(self._idle)

    @property
    def num_idle(self) -> int:
        """Cached blocks that can be evicted."""
        return len(self._idle)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that are here."""
        for i, h in enumerate(hashes):
            if h not in self._uses and h not in self._idle:
                return i
        return len(hashes)

    def acquire(self, hashes: Sequence[bytes]) -> None:
        """Use blocks that are here."""
        for h in hashes:
            self._idle.pop(h, None)
            self._uses[h] = self._uses.get(h, 0) + 1

    def take(self, count: int, now: float) -> bool:
        """Use `count` blocks without content yet, evicting for them; False, with none, if full."""
        if count > self.num_free + len(self._idle):
            return False
        for _ in range(count - self.num_free):
            h, _nothing = self._idle.popitem(last=False)
            self.changes.append(CacheChange(now, h, stored=False))
        self.anonymous += count
        return True

    def name(self, block_hash: bytes, now: float) -> bool:
        """A used block's content is complete; False when the same content is here already.

        Either way the caller now uses the block under its hash; in the second case its own is
        given back.
        """
        self.anonymous -= 1
        known = block_hash in self._uses or block_hash in self._idle
        self.acquire((block_hash,))
        if not known:
            self.changes.append(CacheChange(now, block_hash, stored=True))
        return not known

    def release(self, hashes: Sequence[bytes], anonymous: int) -> None:
        """Give back blocks, in chain order; the end of a chain is evicted before its beginning."""
        self.anonymous -= anonymous
        for h in reversed(hashes):
            left = self._uses[h] - 1
            if left:
                self._uses[h] = left
            else:
                del self._uses[h]
                self._idle[h] = None
