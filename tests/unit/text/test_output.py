"""`ChoiceText`: what a choice shows, when it ends, and that replay gives the same."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.api.sampling import SamplingParams
from quire.text.output import NOTHING, ChoiceText, End

EOS = 2


@dataclass
class Score:
    logprob: float = -0.5
    rank: int = 1
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@pytest.fixture
def tokenizer(pairs):
    return pairs["byte-level"].ours


def choice(tokenizer, **params):
    return ChoiceText(tokenizer, SamplingParams(**params))


def test_text_arrives_with_its_tokens(tokenizer):
    out = choice(tokenizer)
    ids = tokenizer.encode("Hello world")
    deltas = [out.push([i]) for i in ids]
    assert "".join(d.text for d in deltas) == out.text == "Hello world"
    assert out.num_tokens == len(ids)
    assert out.finish_reason is None


def test_end_of_sequence_is_counted_but_not_shown(tokenizer):
    out = choice(tokenizer, skip_special_tokens=False)
    delta = out.push([*tokenizer.encode("Hello"), EOS], end=End("stop", EOS))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Hello", "stop", None)
    assert out.num_tokens == len(tokenizer.encode("Hello")) + 1


def test_stop_token_is_named_and_hidden(tokenizer):
    ids = tokenizer.encode("Hello world")
    out = choice(tokenizer, stop_token_ids=[ids[-1]])
    delta = out.push(ids, end=End("stop", ids[-1]))
    assert delta.stop_reason == ids[-1]
    assert delta.text == tokenizer.decode(ids[:-1])


def test_stop_token_is_shown_when_asked_for(tokenizer):
    ids = tokenizer.encode("Hello world")
    out = choice(tokenizer, stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert out.push(ids, end=End("stop", ids[-1])).text == "Hello world"


@pytest.mark.parametrize(("include", "text"), [(False, "Hello "), (True, "Hello STOP")])
def test_stop_string_ends_the_choice_inside_a_batch(tokenizer, include, text):
    ids = tokenizer.encode("Hello STOP here, please!")
    out = choice(tokenizer, stop=["STOP"], include_stop_str_in_output=include)
    delta = out.push(ids, [Score()] * len(ids))
    assert (out.text, delta.finish_reason, delta.stop_reason) == (text, "stop", "STOP")
    assert delta.num_tokens == len(delta.tokens) == out.num_tokens < len(ids)
    assert out.push(ids) is NOTHING


def test_length_ends_with_what_was_held_back(tokenizer):
    out = choice(tokenizer, stop=["STOP"])
    ids = tokenizer.encode("Hello STO")
    delta = out.push(ids, end=End("length"))
    assert (out.text, delta.finish_reason) == ("Hello STO", "length")


def test_broken_character_at_the_end_becomes_one_replacement(tokenizer):
    ids = tokenizer.encode("🦊")
    out = choice(tokenizer)
    assert out.push(ids[:-1]).text == ""
    assert out.push([], end=End("length")).text == "\ufffd"


def test_min_tokens_lets_stop_strings_pass(tokenizer):
    ids = tokenizer.encode("STOP Hello STOP")
    out = choice(tokenizer, stop=["STOP"], min_tokens=len(tokenizer.encode("STOP")))
    for i in ids:
        out.push([i])
    assert out.text == "STOP Hello "


def test_logprobs_name_tokens_bytes_and_offsets(tokenizer):
    ids = tokenizer.encode("Hello 🦊")
    score = Score(top_ids=[ids[0], ids[1]], top_logprobs=[-0.5, -1.5])
    tokens = choice(tokenizer).push(ids, [score] * len(ids)).tokens
    assert b"".join(t.data for t in tokens).decode() == "Hello 🦊"
    assert [t.offset for t in tokens][:2] == [0, len(tokens[0].text)]
    assert [top.logprob for top in tokens[0].top] == [-0.5, -1.5]
    assert tokens[0].top[0].text == tokens[0].text


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text("abST OP🦊\n", max_size=40),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    min_tokens=st.integers(0, 5),
)
def test_replay_in_other_batches_gives_the_same(pairs, text, cuts, min_tokens):
    """A request that moves to another pod is replayed in one piece."""
    for kind in ("byte-level", "metaspace"):
        tokenizer = pairs[kind].ours
        ids = tokenizer.encode(text, add_special_tokens=False)
        params = {"stop": ["STOP", " \n"], "min_tokens": min_tokens}
        whole = choice(tokenizer, **params)
        whole.push(ids, end=End("length"))
        pieces = choice(tokenizer, **params)
        bounds = [0, *sorted(c for c in cuts if c <= len(ids)), len(ids)]
        for low, high in itertools.pairwise(bounds):
            pieces.push(ids[low:high])
        pieces.push([], end=End("length"))
        for name in ("text", "num_tokens", "finish_reason", "stop_reason"):
            assert getattr(pieces, name) == getattr(whole, name)


def test_detokenize_off_gives_no_text(tokenizer):
    out = choice(tokenizer, detokenize=False)
    assert out.push(tokenizer.encode("Hello")).text == ""
    assert out.num_tokens > 0
