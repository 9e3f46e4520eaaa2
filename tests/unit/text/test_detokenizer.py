"""Incremental text equals the text of the whole, and no character is ever split."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer


def stream(tokenizer, ids, *, skip=True):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces = [detokenizer.push(i) for i in ids]
    return pieces, detokenizer.flush()


def test_byte_level_uses_the_table_and_others_the_window(pairs):
    assert isinstance(pairs["byte-level"].ours.detokenizer(), ByteLevelDetokenizer)
    assert isinstance(pairs["metaspace"].ours.detokenizer(), WindowDetokenizer)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60), skip=st.booleans())
def test_streamed_text_equals_the_decoded_whole(pairs, text, skip):
    for pair in pairs.values():
        ids = pair.ours.encode(text)
        pieces, rest = stream(pair.ours, ids, skip=skip)
        assert "".join(pieces) + rest == pair.ours.decode(ids, skip_special_tokens=skip)


def test_characters_are_never_split(pair):
    ids = pair.ours.encode("狐 🦊🏽 süß смешной 👩‍👩‍👧", add_special_tokens=False)
    pieces, rest = stream(pair.ours, ids)
    assert "\ufffd" not in "".join(pieces) + rest


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.lists(st.integers(0, 499), max_size=30))
def test_any_byte_level_tokens_decode_as_the_whole(pairs, data):
    """Random ids make broken UTF-8: each broken character is one U+FFFD, as in the library."""
    tokenizer = pairs["byte-level"].ours
    pieces, rest = stream(tokenizer, data)
    assert "".join(pieces) + rest == tokenizer.decode(data)


def test_special_tokens_in_the_middle_do_not_eat_spaces(pairs):
    """A window that held only a skipped token used to lose the next token's space."""
    pair = pairs["metaspace"]
    words = pair.ours.encode("Hello world", add_special_tokens=False)
    ids = [*words, 2, *words]
    pieces, rest = stream(pair.ours, ids)
    assert "".join(pieces) + rest == pair.theirs.decode(ids, skip_special_tokens=True)


def test_ids_beyond_the_vocabulary_give_no_text(pair):
    """Models with padded embeddings can draw them."""
    ids = [pair.ours.vocab_size + 5, *pair.ours.encode("Hello", add_special_tokens=False)]
    pieces, rest = stream(pair.ours, ids)
    assert "".join(pieces) + rest == pair.ours.decode(ids)
    assert pair.ours.token_bytes(ids[0]) == b""


def test_broken_characters_do_not_grow_the_window(pairs):
    tokenizer = pairs["metaspace"].ours
    (byte,) = [i for i in range(300) if tokenizer.token_bytes(i) == b"\xf0"][:1]
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(byte) for _ in range(500)]
    assert sum(map(len, pieces)) >= 490


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_cost_does_not_grow_with_the_length(pairs, kind):
    tokenizer = pairs[kind].ours
    rng = random.Random(0)
    words = tokenizer.encode("the quick brown fox jumps", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()

    def spend(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            detokenizer.push(rng.choice(words))
        return time.process_time() - start

    spend(500)
    early = min(spend(500) for _ in range(3))
    spend(15_000)
    assert min(spend(500) for _ in range(3)) < 5 * early + 0.01
