"""Block pool: who holds which KV block, and which prefix each cached block is.

Every block is in exactly one state, and the counts sum to the pool:

    free     no content worth keeping, nobody holds it
    cached   nobody holds it, but it is a known prefix block: kept until its place is needed (LRU)
    owned    held by one or more sequences (reference count > 0); may also be a known prefix block

`promised` is accounting on top: blocks that admitted prompts will still need. They are not bound
yet, so they lie in free or cached, but `num_available` leaves them out.

The pool knows block ids and hashes only; the memory itself belongs to the runner.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from quire.api.block_hash import HASH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_PENDING_EVENTS = 65536
"""Cache events kept for readers; a reader further behind takes a snapshot."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """A change of the prefix cache. `block_hash` None means everything was removed."""

    sequence: int
    block_hash: bytes | None
    parent: bytes | None = None
    stored: bool = True


@dataclass(frozen=True)
class PoolCounts:
    """Blocks by state; free + cached + owned is the pool."""

    free: int
    cached: int
    owned: int
    promised: int


@dataclass(frozen=True, slots=True)
class CacheDigest:
    """Fingerprint of the findable blocks after event `sequence`, whatever order they came in.

    The hashes are blake2b outputs, as good as random, so their exclusive or needs no more mixing.
    """

    sequence: int
    count: int
    hash_xor: bytes


class NoBlocksLeft(Exception):
    """More blocks were asked for than `num_available`; nothing was taken."""


class BlockPool:
    """Reference-counted blocks with a prefix cache over the full ones.

    Sequences take blocks by `allocate` (fresh) or `acquire` (found by `match`) and give each back
    by `release`, exactly once per taking.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.caching = caching
        self.promised = 0
        self.events: deque[CacheEvent] = deque(maxlen=MAX_PENDING_EVENTS)
        self.event_sequence = 0
        self._refs = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._parent: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._hash_xor = 0
        # Last given back, first taken: its memory is the likeliest to be in a cache, and to be
        # there at all, as the system makes pages when they are first written.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Unreferenced cached blocks, least recently used first.
        self._lru: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that may be allocated beyond what admitted prompts were promised."""
        return len(self._free) + len(self._lru) - self.promised

    def counts(self) -> PoolCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._lru)
        return PoolCounts(free, cached, self.num_blocks - free - cached, self.promised)

    def ref_count(self, block: int) -> int:
        """Sequences holding the block."""
        return self._refs[block]

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Longest run of cached or owned blocks named by the leading hashes; takes no reference."""
        found = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `match` found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._lru[block]
            self._refs[block] += 1

    def allocate(self, count: int, *, promised: int = 0) -> list[int]:
        """Take `count` fresh blocks, `promised` of which were promised to the caller.

        Raises NoBlocksLeft, taking nothing, when the others' promises would be broken.
        """
        if count - promised > self.num_available:
            raise NoBlocksLeft
        self.promised -= promised
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block, given in chain order.

        Walked backwards, so that the end of a chain is evicted before its beginning.
        """
        for block in reversed(blocks):
            refs = self._refs[block] - 1
            if refs < 0:
                raise AssertionError(f"block {block} released more often than taken")
            self._refs[block] = refs
            if refs == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._lru[block] = None

    def register(self, block: int, block_hash: bytes, parent: bytes) -> int:
        """Make an owned, fully computed block findable under its hash.

        Returns the block that is known under the hash from now on: another one when two sequences
        computed the same content at the same time. The caller may swap to it (see `adopt`).
        """
        if not self.caching:
            return block
        known = self._by_hash.setdefault(block_hash, block)
        if known == block:
            self._hash[block] = block_hash
            self._parent[block] = parent
            self._hash_xor ^= int.from_bytes(block_hash, "little")
            self._emit(block_hash, parent, stored=True)
        return known

    def adopt(self, mine: int, known: int) -> None:
        """Hold `known` instead of `mine`: the same content, kept once."""
        self.acquire((known,))
        self.release((mine,))

    def reset_cache(self) -> int:
        """Forget every cached prefix; blocks in use stay valid. Returns the prefixes forgotten."""
        forgotten = len(self._by_hash)
        for block in self._by_hash.values():
            self._hash[block] = self._parent[block] = None
        self._by_hash.clear()
        self._hash_xor = 0
        self._free.extend(self._lru)
        self._lru.clear()
        self._emit(None, None, stored=False)
        return forgotten

    def snapshot(self) -> list[tuple[bytes, bytes]]:
        """(hash, parent) of every findable block; parents may come after their children."""
        return [(h, self._parent[b] or b"") for h, b in self._by_hash.items()]

    def events_since(self, sequence: int) -> list[CacheEvent] | None:
        """Events after the one numbered `sequence`; None when some are no longer kept."""
        missing = self.event_sequence - sequence
        if missing > len(self.events):
            return None
        return [self.events[i - missing] for i in range(missing)] if missing else []

    def digest(self) -> CacheDigest:
        """Fingerprint of what `snapshot` would return now; costs nothing."""
        hash_xor = self._hash_xor.to_bytes(HASH_BYTES, "little")
        return CacheDigest(self.event_sequence, len(self._by_hash), hash_xor)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and the index agrees."""
        free, lru = set(self._free), set(self._lru)
        owned = {b for b, refs in enumerate(self._refs) if refs > 0}
        _require(len(free) == len(self._free), "a block is free twice")
        _require(not (free & lru or free & owned or lru & owned), "a block is in two states")
        _require(len(free) + len(lru) + len(owned) == self.num_blocks, "a block is in no state")
        _require(all(self._hash[b] is None for b in free), "a free block has a hash")
        _require(all(self._hash[b] is not None for b in lru), "a cached block has no hash")
        _require(all(self._hash[b] == h for h, b in self._by_hash.items()), "the index is wrong")
        _require(self._hash_xor == _xor(self._by_hash), "the digest is wrong")
        _require(0 <= self.promised <= len(free) + len(lru), "promised more than there is")

    def _evict(self) -> int:
        block, _ = self._lru.popitem(last=False)
        block_hash = self._hash[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hash[block] = self._parent[block] = None
        self._hash_xor ^= int.from_bytes(block_hash, "little")
        self._emit(block_hash, None, stored=False)
        return block

    def _emit(self, block_hash: bytes | None, parent: bytes | None, *, stored: bool) -> None:
        self.event_sequence += 1
        self.events.append(CacheEvent(self.event_sequence, block_hash, parent, stored))


def _xor(hashes: Iterable[bytes]) -> int:
    return reduce(operator.xor, (int.from_bytes(h, "little") for h in hashes), 0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
