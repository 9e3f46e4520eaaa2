"""Cached blocks on their way to another pod or from one: held, found, taken in. Nothing computed.

A request that moves to another pod finds its tokens' blocks there by their hashes, as any cached
prefix:

    the pod it leaves      park      its full blocks stay held when it ends, for a while
                           find      those that were asked for are held while they are sent
    the pod it goes to     prepare   what is here is held, fresh blocks are taken for the rest
                           register  those that arrived can be found by hash
    both                   release   held no longer: cached, or free if nothing arrived in them

Holds have names of their own and no part in scheduling: a waiting request holds none, so that they
cannot keep the running ones from going on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quire.engine.kv.pool import BlockPool


class Link(NamedTuple):
    """A full block's name: its hash, and that of the block before it (or the root)."""

    block_hash: bytes
    parent: bytes


class Handover:
    """The holds of one pool. Called on the engine's thread."""

    def __init__(self, pool: BlockPool, watermark_blocks: int) -> None:
        self._pool = pool
        self._watermark = watermark_blocks
        self._held: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def park(self, key: str, blocks: Sequence[int]) -> None:
        """Hold blocks that their owner is about to release. Repeated, the hold grows."""
        self._pool.acquire(blocks)
        self._held.setdefault(key, []).extend(blocks)

    def find(self, key: str, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        """Hold those of the named blocks that are here: (place in `hashes`, block) of each."""
        found = []
        for place, block_hash in enumerate(hashes):
            found += [(place, block) for block in self._pool.match((block_hash,))]
        self.park(key, [block for _, block in found])
        return found

    def prepare(self, key: str, chain: Iterable[Link]) -> list[tuple[Link, int]]:
        """Hold what is here of the chain, and take a fresh block for each link that is not: as many
        as the running requests can spare, the first links first."""
        missing = []
        for link in dict.fromkeys(chain):
            if known := self._pool.match((link.block_hash,)):
                self.park(key, known)
            else:
                missing.append(link)
        room = max(self._pool.num_available - self._watermark, 0)
        fresh = self._pool.allocate(min(len(missing), room)) if self._pool.caching else []
        self._held.setdefault(key, []).extend(fresh)
        return list(zip(missing, fresh, strict=False))

    def register(self, arrived: Iterable[tuple[Link, int]]) -> None:
        """These blocks, taken by `prepare`, hold what their links name."""
        for link, block in arrived:
            self._pool.register(block, link.block_hash, link.parent)

    def release(self, key: str) -> None:
        """Hold no longer. Unknown keys are ignored."""
        self._pool.release(self._held.pop(key, []))
