"""Sets of pods, each kept once and named by a number: what a block's table entry points to.

Blocks that lie behind each other in a prompt are mostly held by the same pods, so ten million
blocks need few sets, and along a chain the set's *number* changes only where a pod's prefix ends.
Walking a chain costs set operations at those places alone, however long the prompt is.

A set's identity is a 128-bit exclusive or of random numbers, one per pod, so that "this set with,
or without, that pod" is found without a look at its members. A set is freed when no block names it.

Small sets are tuples of slots; large ones bits of one int, which a thousand pods fit in 125 bytes.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALL = 24
"""Most members of a set kept as a tuple."""
EMPTY = 0
"""Number of the set without members; also what a table has for an unknown block."""


class HolderSets:
    """Interned sets of slots with a count of the blocks that name each."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._marks: list[int] = []
        """Slot -> its random number."""
        self._number: dict[int, int] = {0: EMPTY}
        """Identity -> the set's number."""
        self._identity: list[int] = [0]
        self._small: list[tuple[int, ...] | None] = [()]
        """Number -> the members, or None where they are in `_large`."""
        self._large: dict[int, int] = {}
        """Number -> bit s is set for each member slot s."""
        self._uses: list[int] = [1]
        self._unused: list[int] = []

    def __len__(self) -> int:
        """Sets that have members."""
        return len(self._identity) - len(self._unused) - 1

    @property
    def nbytes(self) -> int:
        """About how many bytes the sets take."""
        small = sum(56 + 8 * len(members) for members in self._small if members)
        large = sum(28 + bits.bit_length() // 8 for bits in self._large.values())
        return small + large + 190 * len(self._identity)

    def contains(self, number: int, slot: int) -> bool:
        """The pod in `slot` is in the set."""
        small = self._small[number]
        if small is not None:
            return slot in small
        return bool(self._large[number] >> slot & 1)

    def with_slot(self, number: int, slot: int) -> int:
        """The set with a slot that is not in it. The caller counts its use of it."""
        identity = self._identity[number] ^ self._mark(slot)
        known = self._number.get(identity)
        if known is not None:
            return known
        small = self._small[number]
        if small is not None and len(small) < SMALL:
            return self._new(identity, (*small, slot))
        return self._new(identity, self._bits(number) | 1 << slot)

    def without_slot(self, number: int, slot: int) -> int:
        """The set without a slot that is in it. The caller counts its use of it."""
        identity = self._identity[number] ^ self._mark(slot)
        known = self._number.get(identity)
        if known is not None:
            return known
        small = self._small[number]
        if small is not None:
            return self._new(identity, tuple(s for s in small if s != slot))
        bits = self._large[number] & ~(1 << slot)
        if bits.bit_count() > SMALL:
            return self._new(identity, bits)
        return self._new(identity, tuple(slots_of(bits).tolist()))

    def use(self, number: int, count: int = 1) -> None:
        """`count` more blocks name the set."""
        self._uses[number] += count

    def unuse(self, number: int, count: int = 1) -> None:
        """`count` blocks no longer name the set; the last one frees it."""
        left = self._uses[number] = self._uses[number] - count
        if left == 0:
            del self._number[self._identity[number]]
            self._large.pop(number, None)
            self._small[number] = ()
            self._unused.append(number)

    def uses(self, number: int) -> int:
        """Blocks that name the set."""
        return self._uses[number]

    def bits(self, number: int) -> int:
        """The members as bits of an int."""
        return self._bits(number)

    def _bits(self, number: int) -> int:
        small = self._small[number]
        if small is None:
            return self._large[number]
        bits = 0
        for slot in small:
            bits |= 1 << slot
        return bits

    def _new(self, identity: int, members: tuple[int, ...] | int) -> int:
        if self._unused:
            number = self._unused.pop()
        else:
            number = len(self._identity)
            self._identity.append(0)
            self._small.append(())
            self._uses.append(0)
        self._identity[number] = identity
        self._number[identity] = number
        self._uses[number] = 0
        if isinstance(members, tuple):
            self._small[number] = members
        else:
            self._small[number] = None
            self._large[number] = members
        return number

    def _mark(self, slot: int) -> int:
        while len(self._marks) <= slot:
            self._marks.append(self._random.getrandbits(128))
        return self._marks[slot]


def slots_of(bits: int) -> NDArray[np.int64]:
    """The slots whose bits are set, in ascending order."""
    if bits.bit_count() <= 8:
        few = []
        while bits:
            lowest = bits & -bits
            few.append(lowest.bit_length() - 1)
            bits ^= lowest
        return np.array(few, np.int64)
    data = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(data, bitorder="little"))
