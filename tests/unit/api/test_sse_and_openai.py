"""Chunks made from templates equal chunks made in the slow and obvious way."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.api.openai import (
    ChunkTemplate,
    Head,
    Usage,
    chat_logprobs,
    completion_logprobs,
    usage_chunk,
)
from quire.api.sse import event
from quire.api.tokens import TokenText, TopToken

HEAD = Head("chatcmpl-1", 1700000000, 'a "quoted" name\n')
KIND = "chat.completion.chunk"
TEMPLATE = ChunkTemplate(HEAD, KIND, 3, (b'"delta":{"content":', b"}"))


@given(st.text())
def test_template_equals_plain_json(text):
    chunk = TEMPLATE.text(text) + b"}"
    assert json.loads(chunk) == {
        "id": HEAD.id,
        "object": KIND,
        "created": HEAD.created,
        "model": HEAD.model,
        "choices": [
            {"index": 3, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert b"\n" not in chunk  # it would end the event's line


def test_full_chunk_says_why_it_ended():
    chunk = TEMPLATE.full(b'"delta":{}', finish_reason="stop", stop_reason="END") + b"}"
    (choice,) = json.loads(chunk)["choices"]
    assert choice == {
        "index": 3, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": "END",
    }  # fmt: skip
    assert b"stop_reason" not in TEMPLATE.full(b'"delta":{}', finish_reason="stop")


def test_usage_chunk_has_no_choices():
    body = json.loads(usage_chunk(HEAD, KIND, Usage(10, 5, 8)))
    assert body["choices"] == []
    assert body["usage"]["total_tokens"] == 15
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}


def test_event_is_numbered():
    assert event(b"{}", 7) == b"id: 7\ndata: {}\n\n"


def token(text="é", logprob=-0.5, top=()):
    return TokenText(1, text, text.encode(), 2, logprob, 1, top)


def test_chat_logprobs_show_only_as_many_alternatives_as_asked_for():
    top = tuple(TopToken(i, str(i), b"%d" % i, -float(i)) for i in range(5))
    body = chat_logprobs([token(top=top)], 2)
    (entry,) = body["content"]
    assert entry["bytes"] == [0xC3, 0xA9]
    assert [alternative["token"] for alternative in entry["top_logprobs"]] == ["0", "1"]


def test_banned_tokens_have_a_number_json_knows():
    """Minus infinity is not JSON; OpenAI shows -9999."""
    body = chat_logprobs([token(logprob=float("-inf"))], 0)
    assert body["content"][0]["logprob"] == -9999.0


@pytest.mark.parametrize(("num_top", "expected"), [(0, None), (1, [{"é": -0.5, "x": -1.0}])])
def test_completion_logprobs(num_top, expected):
    top = (TopToken(9, "x", b"x", -1.0), TopToken(8, "y", b"y", -2.0))
    body = completion_logprobs([token(top=top)], num_top, offset=10)
    assert body == {
        "tokens": ["é"], "token_logprobs": [-0.5], "top_logprobs": expected, "text_offset": [12],
    }  # fmt: skip
