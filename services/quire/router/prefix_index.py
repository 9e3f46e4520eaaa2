"""Prefix index: which pods hold a block, and how much of a prompt each pod therefore has.

    table   block key -> number of a set of pods        (hash_table)
    sets    number -> the pods, each set kept once      (holders)
    pods    slot -> keys it stored, count, digest       (to replace or forget a pod's share)

A pod's prefix ends at the first block it lacks, wherever else it holds blocks: eviction is
leaf-first by design, but nothing here depends on it. Looking a prompt up takes O(blocks) for the
table, all at once, and set operations only where the set changes along the chain.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quire.api.block_hash import HASH_BYTES
from quire.router.hash_table import HashTable, key_of, keys_of
from quire.router.holders import EMPTY, SMALL, HolderSets, slots_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

SLACK_KEYS = 64
"""Removed keys that a pod's list may hold before it is cleaned, on top of as many as it has."""
MAX_RUNS = 256
"""Most places of a chain where sets are compared. With more, evenly chosen ones: pods are then
under-estimated by up to 1/256 of the prompt, and a decision stays bounded."""


@dataclass(slots=True)
class _Share:
    """What one pod holds."""

    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Every held key at least once; also some that are no longer held."""
    count: int = 0
    hash_xor: int = 0


class PrefixIndex:
    """Blocks held by pods, which are numbered by slot."""

    def __init__(self, seed: int | None = None) -> None:
        self._table = HashTable()
        self._sets = HolderSets(seed)
        self._shares: dict[int, _Share] = {}

    def __len__(self) -> int:
        """Different blocks known."""
        return len(self._table)

    @property
    def num_sets(self) -> int:
        """Different sets of pods."""
        return len(self._sets)

    @property
    def num_held(self) -> int:
        """Pairs of pod and block."""
        return sum(share.count for share in self._shares.values())

    @property
    def nbytes(self) -> int:
        """About how many bytes the index takes."""
        shares = sum(200 + 8 * len(share.keys) for share in self._shares.values())
        return self._table.nbytes + self._sets.nbytes + shares

    def reserve(self, num_blocks: int) -> None:
        """Make room for this many different blocks, so that no update stops to grow the table."""
        self._table.reserve(num_blocks)

    # ---- what a pod tells

    def store(self, slot: int, block_hash: bytes) -> bool:
        """The pod holds the block now; False when it was known to."""
        key, share = key_of(block_hash), self._share(slot)
        number = self._table.get(key)
        if self._sets.contains(number, slot):
            return False
        self._move(key, number, self._sets.with_slot(number, slot))
        share.keys.append(key)
        share.count += 1
        share.hash_xor ^= int.from_bytes(block_hash, "little")
        return True

    def remove(self, slot: int, block_hash: bytes) -> bool:
        """The pod no longer holds the block; False when it was not known to."""
        key, share = key_of(block_hash), self._share(slot)
        number = self._table.get(key)
        if not self._sets.contains(number, slot):
            return False
        self._move(key, number, self._sets.without_slot(number, slot))
        share.count -= 1
        share.hash_xor ^= int.from_bytes(block_hash, "little")
        if len(share.keys) > 2 * share.count + SLACK_KEYS:
            share.keys = array("Q", self._held(slot).tobytes())
        return True

    def replace(self, slot: int, hashes: Sequence[bytes]) -> None:
        """The pod holds exactly these blocks. Only what differs is touched."""
        keys, held = np.unique(keys_of(hashes)), self._held(slot)
        self._take(slot, np.setdiff1d(held, keys, assume_unique=True))
        given = np.setdiff1d(keys, held, assume_unique=True)
        self._give(slot, given, self._table.find(given))
        self._shares[slot] = _Share(array("Q", keys.tobytes()), len(keys), _xor(hashes))

    def clear(self, slot: int) -> None:
        """The pod holds nothing."""
        self._take(slot, self._held(slot))
        self._shares.pop(slot, None)

    def add(self, slot: int, keys: NDArray[np.uint64]) -> None:
        """The pod will hold these blocks of one chain, by their keys. They are in no digest."""
        numbers = self._table.find(keys)
        missing = ~self._contain(numbers, slot)
        if not missing.any():
            return
        keys = keys[missing]
        self._give(slot, keys, numbers[missing])
        share = self._share(slot)
        share.keys.frombytes(keys.tobytes())
        share.count += len(keys)

    # ---- what is asked

    def depths(self, keys: NDArray[np.uint64], num_slots: int) -> NDArray[np.int32]:
        """Leading blocks of a chain that each pod holds."""  # [blocks] -> [num_slots]
        depths = np.zeros(num_slots, np.int32)
        numbers = self._table.leading(keys)
        if not len(numbers):
            return depths
        starts, ends = _runs(numbers)
        if len(starts) > MAX_RUNS:
            chosen = np.linspace(0, len(starts) - 1, MAX_RUNS).astype(np.int64)
            starts, ends = starts[chosen], ends[chosen]
        sets, end = numbers[starts].tolist(), int(ends[0])
        alive = self._sets.bits(sets[0])
        for run, number in enumerate(sets[1:], 1):
            if alive.bit_count() <= SMALL:
                self._walk_few(depths, slots_of(alive).tolist(), sets[run:], ends[run - 1 :])
                return depths
            left = alive & self._sets.bits(number)
            if left != alive:
                depths[slots_of(alive ^ left)] = end
                alive = left
            end = int(ends[run])
        depths[slots_of(alive)] = end
        return depths

    def count(self, slot: int) -> int:
        """Blocks the pod holds."""
        share = self._shares.get(slot)
        return share.count if share else 0

    def hash_xor(self, slot: int) -> bytes:
        """Exclusive or of the hashes the pod holds, as in its own digest."""
        share = self._shares.get(slot)
        return (share.hash_xor if share else 0).to_bytes(HASH_BYTES, "little")

    def holds(self, slot: int, block_hash: bytes) -> bool:
        """The pod holds the block."""
        return self._sets.contains(self._table.get(key_of(block_hash)), slot)

    def check_integrity(self) -> None:
        """Raise AssertionError unless table, sets and shares agree."""
        used = self._table.values[self._table.keys != 0]
        numbers, counts = np.unique(used, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            _require(number != EMPTY, "a block without holders is in the table")
            _require(self._sets.uses(number) == count, "a set is counted wrongly")
        _require(len(numbers) == len(self._sets), "a set is kept that no block names")
        _require(len(used) == len(self._table), "the table is counted wrongly")
        for slot, share in self._shares.items():
            _require(len(self._held(slot)) == share.count, "a pod's blocks are counted wrongly")

    # ---- sets of blocks

    def _walk_few(
        self, depths: NDArray[np.int32], slots: list[int], sets: list[int], ends: NDArray[np.int64]
    ) -> None:
        """The rest of `depths`, for few pods: they hold all up to ends[0], then come the sets."""
        contains = self._sets.contains
        for end, number in zip(ends.tolist(), sets, strict=False):
            ended = [s for s in slots if not contains(number, s)]
            if ended:
                depths[ended] = end
                slots = [s for s in slots if contains(number, s)]
                if not slots:
                    return
        depths[slots] = ends[-1]

    def _move(self, key: int, old: int, new: int) -> None:
        if new == EMPTY:
            self._table.remove(key)
        else:
            self._sets.use(new)
            self._table.put(key, new)
        if old != EMPTY:
            self._sets.unuse(old)

    def _give(self, slot: int, keys: NDArray[np.uint64], sets: NDArray[np.uint32]) -> None:
        """The pod holds blocks that it did not hold; `sets` is what the table has for them."""
        if not len(keys):
            return
        keys, numbers, counts = _grouped(keys, sets)
        moved = []
        for number, count in zip(numbers, counts.tolist(), strict=True):
            moved.append(new := self._sets.with_slot(number, slot))
            self._sets.use(new, count)
        self._table.put_all(keys, np.repeat(np.array(moved, np.uint32), counts))
        self._release(numbers, counts)

    def _take(self, slot: int, keys: NDArray[np.uint64]) -> None:
        """The pod no longer holds blocks that it held."""
        if not len(keys):
            return
        keys, numbers, counts = _grouped(keys, self._table.find(keys))
        moved = []
        for number, count in zip(numbers, counts.tolist(), strict=True):
            moved.append(new := self._sets.without_slot(number, slot))
            if new != EMPTY:
                self._sets.use(new, count)
        values = np.repeat(np.array(moved, np.uint32), counts)
        kept = values != EMPTY
        self._table.put_all(keys[kept], values[kept])
        for key in keys[~kept].tolist():
            self._table.remove(key)
        self._release(numbers, counts)

    def _release(self, numbers: list[int], counts: NDArray[np.int64]) -> None:
        for number, count in zip(numbers, counts.tolist(), strict=True):
            if number != EMPTY:
                self._sets.unuse(number, count)

    def _held(self, slot: int) -> NDArray[np.uint64]:
        """Keys the pod holds, ascending."""
        share = self._shares.get(slot)
        if share is None:
            return np.empty(0, np.uint64)
        keys = np.unique(np.frombuffer(share.keys, np.uint64))
        return keys[self._contain(self._table.find(keys), slot)]

    def _contain(self, numbers: NDArray[np.uint32], slot: int) -> NDArray[np.bool]:
        """For each set, whether the pod is in it."""
        known = np.unique(numbers)
        held = [number for number in known.tolist() if self._sets.contains(number, slot)]
        return np.isin(numbers, np.array(held, np.uint32))

    def _share(self, slot: int) -> _Share:
        share = self._shares.get(slot)
        if share is None:
            share = self._shares[slot] = _Share()
        return share


def _grouped(
    keys: NDArray[np.uint64], sets: NDArray[np.uint32]
) -> tuple[NDArray[np.uint64], list[int], NDArray[np.int64]]:
    """The keys, by the set they have: (keys in order, sets, keys of each)."""
    starts, ends = _runs(sets)
    if len(starts) > MAX_RUNS:  # a chain comes in few runs as it is
        order = np.argsort(sets, kind="stable")
        keys, sets = keys[order], sets[order]
        starts, ends = _runs(sets)
    return keys, sets[starts].tolist(), ends - starts


def _runs(numbers: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Half-open ranges [start, end) of equal neighbours; there is at least one number."""
    borders = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    return np.concatenate(([0], borders)), np.concatenate((borders, [len(numbers)]))


def _xor(hashes: Iterable[bytes]) -> int:
    """Exclusive or of 16-byte hashes, in the byte order of the pod's digest."""
    words = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)
    return int.from_bytes(np.bitwise_xor.reduce(words, axis=0).tobytes(), "little")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
