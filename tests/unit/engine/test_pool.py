"""Block pool: every block in exactly one state, whatever is asked of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from quire.api import block_hash
from quire.engine.kv.pool import BlockPool, NoBlocksLeft

ROOT = block_hash.root(b"model")


def chain(*blocks: int) -> list[bytes]:
    """Hashes of a chain of blocks, each filled with one token id."""
    return block_hash.extend(ROOT, [t for b in blocks for t in [b] * 16])


def registered(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(hashes))
    parents = [ROOT, *hashes]
    for block, h, parent in zip(blocks, hashes, parents, strict=False):
        pool.register(block, h, parent)
    return blocks


def test_a_cached_prefix_is_found_after_its_owner_is_gone() -> None:
    pool, hashes = BlockPool(8), chain(1, 2, 3)
    blocks = registered(pool, hashes)
    pool.release(blocks)
    assert pool.match([*hashes[:2], *chain(9)]) == blocks[:2]
    pool.check_integrity()


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    pool, hashes = BlockPool(4), chain(1, 2, 3)
    blocks = registered(pool, hashes)
    pool.release(blocks)
    pool.allocate(2)  # one free block and one cached one
    assert pool.match(hashes) == blocks[:2]


def test_least_recently_used_prefixes_are_evicted_first() -> None:
    pool = BlockPool(2)
    old, new = registered(pool, chain(1)), registered(pool, chain(2))
    pool.release(old)
    pool.release(new)
    pool.acquire(old)  # touched again
    pool.release(old)
    pool.allocate(1)
    assert pool.match(chain(1)) == old
    assert pool.match(chain(2)) == []


def test_the_block_given_back_last_is_taken_first() -> None:
    """Else every sequence gets memory that was never touched, until the whole pool has been."""
    pool = BlockPool(8)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(4) == first + second


def test_promised_blocks_are_not_given_to_others() -> None:
    pool = BlockPool(4)
    pool.promised = 3
    with pytest.raises(NoBlocksLeft):
        pool.allocate(2)
    assert len(pool.allocate(3, promised=3)) == 3
    assert pool.promised == 0
    pool.check_integrity()


def test_releasing_twice_is_an_error_and_not_a_silent_double_free() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_equal_content_computed_twice_is_kept_once() -> None:
    pool, hashes = BlockPool(4), chain(1)
    [mine] = registered(pool, hashes)
    [twin] = pool.allocate(1)
    known = pool.register(twin, hashes[0], ROOT)
    assert known == mine
    pool.acquire((known,))
    pool.release((twin,))
    assert pool.counts().owned == 1
    assert pool.ref_count(mine) == 2
    pool.check_integrity()


def test_events_are_numbered_without_gaps_and_a_lagging_reader_is_told() -> None:
    pool = BlockPool(2)
    pool.release(registered(pool, chain(1, 2)))
    pool.allocate(1)
    events = pool.events_since(0)
    assert events is not None
    assert [e.sequence for e in events] == [1, 2, 3]
    assert [e.stored for e in events] == [True, True, False]
    assert pool.events_since(3) == []
    pool.events.popleft()
    assert pool.events_since(0) is None


def test_reset_forgets_prefixes_but_not_blocks_in_use() -> None:
    pool, hashes = BlockPool(4), chain(1, 2)
    blocks = registered(pool, hashes)
    assert pool.reset_cache() == 2
    assert pool.match(hashes) == []
    assert pool.counts().owned == 2
    pool.release(blocks)
    assert pool.counts().free == 4
    pool.check_integrity()


def test_hashes_depend_on_salt_and_on_everything_before() -> None:
    tokens = list(range(32))
    salted = block_hash.root(b"model", salt=b"tenant")
    assert block_hash.extend(ROOT, tokens)[1] != block_hash.extend(salted, tokens)[1]
    assert block_hash.extend(ROOT, tokens)[1] != block_hash.extend(ROOT, tokens[16:])[0]
    first = block_hash.extend(ROOT, tokens[:16])[0]
    assert block_hash.extend(first, tokens, 16) == block_hash.extend(ROOT, tokens)[1:]
    # a known answer: the chain is the same on every host and in every version
    known = block_hash.extend(block_hash.root(bytes(16), "lora", b"salt"), range(16))[0].hex()
    assert known == "ea7ac39b772ccaea81827b6e6d3a5b5b"


class PoolMachine(RuleBasedStateMachine):
    """Random takers of blocks against a small pool; a model of who holds what."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: dict[int, int] = {}

    @rule(target=taken, ids=st.lists(st.integers(0, 3), min_size=1, max_size=5))
    def take(self, ids: list[int]) -> list[int]:
        """As a sequence does: cached prefix first, fresh blocks for the rest."""
        hashes = chain(*ids)
        found = self.pool.match(hashes)
        self.pool.acquire(found)
        try:
            fresh = self.pool.allocate(len(ids) - len(found))
        except NoBlocksLeft:
            self.pool.release(found)
            return []
        blocks = found + fresh
        for i in range(len(found), len(ids)):
            known = self.pool.register(blocks[i], hashes[i], hashes[i - 1] if i else ROOT)
            if known != blocks[i]:
                self.pool.acquire((known,))
                self.pool.release((blocks[i],))
                blocks[i] = known
        for block in blocks:
            self.held[block] = self.held.get(block, 0) + 1
        return blocks

    @rule(blocks=consumes(taken))
    def give_back(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.held[block] -= 1

    @rule(target=taken, blocks=taken)
    def share(self, blocks: list[int]) -> list[int]:
        """As a fork does. Bundles keep what was consumed elsewhere out."""
        if any(self.held.get(b, 0) == 0 for b in blocks):
            return []
        self.pool.acquire(blocks)
        for block in blocks:
            self.held[block] += 1
        return list(blocks)

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity()
        for block, count in self.held.items():
            assert self.pool.ref_count(block) == count
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.owned == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_the_digest_depends_on_the_content_alone() -> None:
    one, other = BlockPool(8), BlockPool(8)
    registered(one, chain(1, 2))
    first = registered(one, chain(3))
    registered(other, chain(3))
    registered(other, chain(1, 2))
    assert one.digest().count == other.digest().count == 3
    assert one.digest().hash_xor == other.digest().hash_xor
    one.release(first)
    one.reset_cache()
    assert (one.digest().count, one.digest().hash_xor) == (0, bytes(16))
