"""The prefix index against a dict of sets, whatever pods tell it."""

from __future__ import annotations

from functools import reduce
from operator import xor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quire.api import block_hash
from quire.router import holders, prefix_index
from quire.router.hash_table import HashTable, key_of, keys_of
from quire.router.in_flight import InFlight
from quire.router.prefix_index import PrefixIndex

ROOT = block_hash.root(b"model")
SLOTS = 6


def chain(*blocks: int) -> list[bytes]:
    """Hashes of a chain of blocks, each filled with one token id."""
    return block_hash.extend(ROOT, [t for b in blocks for t in [b] * 16])


def depths(index: PrefixIndex, hashes: list[bytes], slots: int = SLOTS) -> list[int]:
    return index.depths(keys_of(hashes), slots).tolist()


# ---- the table


keys = st.integers(1, 40).map(lambda k: k << 58 | k % 3)  # few homes: long probe sequences


@given(st.lists(st.tuples(st.booleans(), keys, st.integers(1, 9)), max_size=200))
def test_the_table_is_a_dict(operations: list[tuple[bool, int, int]]) -> None:
    table, model = HashTable(), {}
    for put, key, value in operations:
        if put:
            table.put(key, value)
            model[key] = value
        elif key in model:
            table.remove(key)
            del model[key]
    assert len(table) == len(model)
    asked = np.array([k << 58 | k % 3 for k in range(1, 41)], np.uint64)
    expected = [model.get(int(k), 0) for k in asked]
    assert table.find(asked).tolist() == expected
    assert [table.get(int(k)) for k in asked] == expected


@given(st.sets(st.integers(1, 2**64 - 1), max_size=3000), st.integers(0, 3))
def test_many_keys_at_once_are_many_single_ones(known: set[int], shift: int) -> None:
    table = HashTable()
    array = np.array(sorted(known), np.uint64) >> np.uint64(shift) | np.uint64(1)
    array = np.unique(array)
    values = np.arange(1, len(array) + 1, dtype=np.uint32)
    table.put_all(array[::2], values[::2])
    table.put_all(array, values)
    assert len(table) == len(array)
    assert table.find(array).tolist() == values.tolist()


def test_leading_values_end_at_the_first_missing_key() -> None:
    table = HashTable()
    array = np.arange(1, 1001, dtype=np.uint64)
    table.put_all(np.delete(array, 700), np.ones(999, np.uint32))
    assert len(table.leading(array)) == 700
    assert len(table.leading(array[701:])) == 299
    assert len(table.leading(array[:0])) == 0


# ---- the index


def test_the_longest_prefix_is_found_per_pod() -> None:
    index, prompt = PrefixIndex(), chain(1, 2, 3, 4)
    for slot, held in ((0, 4), (1, 2), (2, 1)):
        index.replace(slot, prompt[:held])
    assert depths(index, prompt) == [4, 2, 1, 0, 0, 0]
    assert depths(index, [*prompt[:2], *chain(1, 2, 9)[2:]]) == [2, 2, 1, 0, 0, 0]


def test_a_hole_ends_the_prefix() -> None:
    index, prompt = PrefixIndex(), chain(1, 2, 3, 4)
    index.replace(0, [prompt[0], *prompt[2:]])
    assert depths(index, prompt)[0] == 1


def test_a_prefix_that_every_pod_holds_to_another_depth() -> None:
    index, prompt = PrefixIndex(), chain(*range(100))
    for slot in range(100):
        index.replace(slot, prompt[: slot + 1])
    assert depths(index, prompt, 100) == list(range(1, 101))
    for slot in range(0, 100, 2):
        index.clear(slot)
    assert depths(index, prompt, 100) == [(s + 1) * (s % 2) for s in range(100)]
    index.check_integrity()


def test_removed_keys_do_not_pile_up() -> None:
    index = PrefixIndex()
    for i in range(2000):
        (h,) = chain(i)
        index.store(0, h)
        index.remove(0, h)
    assert len(index) == 0
    assert index.nbytes < PrefixIndex().nbytes + 4096


def test_sets_of_pods_are_shared_by_blocks() -> None:
    index, prompt = PrefixIndex(), chain(*range(500))
    for slot in range(50):
        index.replace(slot, prompt)
    assert index.num_held == 25_000
    assert len(index) == 500
    assert index.num_sets == 1


POOL = [h for first in (1, 2) for h in chain(first, *range(20, 27))]
hashes = st.sampled_from(POOL)
slots = st.integers(0, SLOTS - 1)


class IndexBesideSets(RuleBasedStateMachine):
    """Random stores, removals, replacements and clears of a few pods' blocks."""

    @initialize(small=st.integers(0, 4))
    def start(self, small: int) -> None:
        # small sets are kept in another form than large ones: let both forms occur
        self._saved = holders.SMALL, prefix_index.SMALL
        holders.SMALL = prefix_index.SMALL = small
        self.index = PrefixIndex(seed=0)
        self.model: dict[int, set[bytes]] = {slot: set() for slot in range(SLOTS)}

    def teardown(self) -> None:
        if hasattr(self, "_saved"):
            holders.SMALL, prefix_index.SMALL = self._saved

    @rule(slot=slots, h=hashes)
    def store(self, slot: int, h: bytes) -> None:
        assert self.index.store(slot, h) is (h not in self.model[slot])
        self.model[slot].add(h)

    @rule(slot=slots, count=st.integers(1, 8), first=st.booleans())
    def store_chain(self, slot: int, count: int, first: bool) -> None:
        for h in POOL[8 * first :][:count]:
            self.store(slot, h)

    @rule(slot=slots, h=hashes)
    def remove(self, slot: int, h: bytes) -> None:
        assert self.index.remove(slot, h) is (h in self.model[slot])
        self.model[slot].discard(h)

    @rule(slot=slots, kept=st.lists(hashes, max_size=12, unique=True))
    def replace(self, slot: int, kept: list[bytes]) -> None:
        self.index.replace(slot, kept)
        self.model[slot] = set(kept)

    @rule(slot=slots)
    def clear(self, slot: int) -> None:
        self.index.clear(slot)
        self.model[slot] = set()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        self.index.check_integrity()
        for start in (0, 8):
            prompt = POOL[start : start + 8]
            assert depths(self.index, prompt) == [
                next((i for i, h in enumerate(prompt) if h not in held), len(prompt))
                for held in self.model.values()
            ]
        for slot, held in self.model.items():
            assert self.index.count(slot) == len(held)
            expected = reduce(xor, (int.from_bytes(h, "little") for h in held), 0)
            assert int.from_bytes(self.index.hash_xor(slot), "little") == expected


TestIndexBesideSets = IndexBesideSets.TestCase
TestIndexBesideSets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("h", [bytes(16), bytes(8) + b"\1" * 8, b"\xff" * 16])
def test_any_sixteen_bytes_are_a_hash(h: bytes) -> None:
    index = PrefixIndex()
    index.store(3, h)
    assert keys_of([h]).tolist() == [key_of(h)]
    assert index.holds(3, h)
    assert depths(index, [h])[3] == 1


# ---- prompts on their way


def test_a_prompt_on_its_way_counts_until_it_is_too_old() -> None:
    flights, prompt = InFlight(ttl_s=1.0), keys_of(chain(1, 2, 3))
    flights.claim(2, prompt, now=10.0)
    assert flights.depths(prompt, SLOTS, 10.0)[2] == 3
    assert flights.depths(prompt, SLOTS, 10.99)[2] == 3
    assert flights.depths(prompt, SLOTS, 12.1)[2] == 0


def test_a_prompt_on_its_way_to_a_pod_that_left_is_forgotten() -> None:
    flights, prompt = InFlight(ttl_s=1.0), keys_of(chain(1, 2, 3))
    flights.claim(2, prompt, now=10.0)
    flights.forget(2)
    assert not flights.depths(prompt, SLOTS, 10.0).any()


def test_a_chain_with_many_different_sets_is_estimated_from_below(monkeypatch) -> None:
    monkeypatch.setattr(prefix_index, "MAX_RUNS", 10)
    index, prompt = PrefixIndex(), chain(*range(100))
    for slot in range(100):
        index.replace(slot, prompt[: slot + 1])
    found = np.array(depths(index, prompt, 100))
    exact = np.arange(1, 101)
    assert (found <= exact).all()
    assert (exact - found).max() <= 11
