"""A table of block hashes in two flat arrays: 12 bytes a slot, whole chains looked up at once.

Ten million blocks in a dict of bytes take 1 GB and one look-up after the other; here they take
0.2 GB (load factor at most 0.7) and the hashes of a prompt are found together, in numpy.

Open addressing with linear probing. A key is the first 8 bytes of a block's hash: two different
blocks that share them cost a wrong estimate, never a wrong token, because a pod matches the full
16 bytes itself. Removal closes the gap it leaves (no tombstones), so nothing has to be swept.

    keys    u64 [capacity]   0 = empty
    values  u32 [capacity]   never 0 where there is a key
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

MIN_CAPACITY = 1 << 10
MAX_LOAD = 0.7


def keys_of(hashes: Iterable[bytes]) -> NDArray[np.uint64]:
    """Table keys of 16-byte block hashes, given one by one or joined."""  # [len(hashes)]
    keys = np.frombuffer(b"".join(hashes), np.uint64)[::2].copy()
    keys[keys == 0] = 1  # 0 means empty
    return keys


def key_of(block_hash: bytes) -> int:
    """Table key of one 16-byte block hash."""
    return int.from_bytes(block_hash[:8], sys.byteorder) or 1


class HashTable:
    """u64 key -> u32 value, both not 0."""

    def __init__(self, capacity: int = 0) -> None:
        self._count = 0
        self._allocate(_power_of_two(capacity))

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` keys, so that adding them does not stop to grow."""
        if count > self._limit:
            self._grow(_power_of_two(int(count / MAX_LOAD) + 1))

    # ---- one key

    def get(self, key: int) -> int:
        """The key's value, 0 when it is not here."""
        keys, mask, at = self._keys, self._mask, key & self._mask
        while (found := keys[at]) != key:
            if not found:
                return 0
            at = (at + 1) & mask
        return self._values[at]

    def put(self, key: int, value: int) -> None:
        """Set the key's value."""
        if self._count >= self._limit:
            self._grow(2 * (self._mask + 1))
        keys, mask, at = self._keys, self._mask, key & self._mask
        while (found := keys[at]) != key:
            if not found:
                keys[at] = key
                self._count += 1
                break
            at = (at + 1) & mask
        self._values[at] = value

    def remove(self, key: int) -> None:
        """Forget a key that is here, and move up those behind it that had to make way."""
        keys, values, mask = self._keys, self._values, self._mask
        at = key & mask
        while keys[at] != key:
            at = (at + 1) & mask
        self._count -= 1
        gap = at
        while True:
            at = (at + 1) & mask
            moving = keys[at]
            if not moving:
                break
            # it may fill the gap unless its home lies cyclically in (gap, at]
            if ((at - moving) & mask) >= ((at - gap) & mask):
                keys[gap], values[gap] = moving, values[at]
                gap = at
        keys[gap] = values[gap] = 0

    # ---- many keys

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """The values of keys, 0 for those that are not here."""  # [n] -> [n]
        return self.values[self._places(keys)]

    def leading(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """The values of the leading keys up to the first that is not here.

        Most prompts are new after a while: looking in growing windows spares their tails.
        """
        start, width = 0, 64
        parts = []
        while start < len(keys):
            values = self.find(keys[start : start + width])
            missing = np.flatnonzero(values == 0)
            if len(missing):
                parts.append(values[: missing[0]])
                break
            parts.append(values)
            start, width = start + width, 4 * width
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def put_all(self, keys: NDArray[np.uint64], values: NDArray[np.uint32]) -> None:
        """Set the values of distinct keys."""
        self.reserve(self._count + len(keys))
        mask = np.uint64(self._mask)
        at = (keys & mask).astype(np.int64)
        while len(keys):
            found = self.keys[at]
            free = found == 0
            # of several keys that meet at a free place one wins, which reading it back shows
            self.keys[at[free]] = keys[free]
            mine = self.keys[at] == keys
            self.values[at[mine]] = values[mine]
            self._count += int(np.count_nonzero(mine & free))
            lost = ~mine
            keys, values = keys[lost], values[lost]
            at = (at[lost] + 1) & self._mask

    def _places(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where each key is, or the empty place where its search ends."""
        at = (keys & np.uint64(self._mask)).astype(np.int64)
        found = self.keys[at]
        (going,) = np.nonzero((found != keys) & (found != 0))
        while len(going):
            at[going] = (at[going] + 1) & self._mask
            found = self.keys[at[going]]
            going = going[(found != keys[going]) & (found != 0)]
        return at

    # ---- arrays

    def _allocate(self, capacity: int) -> None:
        self.keys = np.zeros(capacity, np.uint64)
        self.values = np.zeros(capacity, np.uint32)
        # reading single items through a memoryview takes half the time of the array's own
        self._keys, self._values = self.keys.data, self.values.data
        self._mask = capacity - 1
        self._limit = int(capacity * MAX_LOAD)

    def _grow(self, capacity: int) -> None:
        (held,) = np.nonzero(self.keys)
        keys, values = self.keys[held], self.values[held]
        self._allocate(capacity)
        self._count = 0
        self.put_all(keys, values)


def _power_of_two(least: int) -> int:
    return max(MIN_CAPACITY, 1 << max(least - 1, 0).bit_length())
