"""OpenAI's response bodies. Field order and nulls are what clients were tested with.

Rules that clients break on when they are not kept: `id`, `object`, `created` (an integer), `model`
and every choice's `index` always; usage of a stream in a chunk of its own with `choices: []`;
`finish_reason` one of OpenAI's words; absent keys of a delta left out, never null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.api.sse import encode_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.api.tokens import TokenText


@dataclass(frozen=True)
class Head:
    """What all chunks of a response have in common."""

    id: str
    created: int
    """Unix time, seconds."""
    model: str


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


@dataclass(frozen=True)
class FinishedChoice:
    """A choice of an answer that is not streamed."""

    index: int
    text: str
    finish_reason: str
    stop_reason: int | str | None
    logprobs: dict[str, Any] | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


def chat_completion(
    head: Head, role: str, choices: Sequence[FinishedChoice], usage: Usage
) -> dict[str, Any]:
    """The body of a chat answer."""
    body = {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": choice.index,
                "message": {"role": role, "content": choice.text, "refusal": None},
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                **_stop_reason(choice.stop_reason),
            }
            for choice in choices
        ],
        "usage": usage.body(),
    }
    if choices and choices[0].prompt_logprobs is not None:
        body["prompt_logprobs"] = choices[0].prompt_logprobs
    return body


def text_completion(head: Head, choices: Sequence[FinishedChoice], usage: Usage) -> dict[str, Any]:
    """The body of a completion answer."""
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                **_stop_reason(choice.stop_reason),
                **(
                    {}
                    if choice.prompt_logprobs is None
                    else {"prompt_logprobs": choice.prompt_logprobs}
                ),
            }
            for choice in choices
        ],
        "usage": usage.body(),
    }


def _stop_reason(reason: int | str | None) -> dict[str, int | str]:
    return {} if reason is None else {"stop_reason": reason}


def chat_logprobs(tokens: Sequence[TokenText], num_top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    return {
        "content": [
            {
                "token": token.text,
                "logprob": finite(token.logprob or 0.0),
                "bytes": list(token.data),
                "top_logprobs": [
                    {"token": top.text, "logprob": finite(top.logprob), "bytes": list(top.data)}
                    for top in token.top[:num_top]
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[TokenText], num_top: int, *, offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of a completion choice; `offset` characters precede the first token's text."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else finite(token.logprob) for token in tokens
        ],
        "top_logprobs": [_top(token, num_top) for token in tokens] if num_top else None,
        "text_offset": [offset + token.offset for token in tokens],
    }


def _top(token: TokenText, num_top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    # OpenAI adds the drawn token when it is not among the top; two tokens may read the same, and
    # then the likelier one stays
    top = {token.text: finite(token.logprob)}
    for entry in token.top[:num_top]:
        if finite(entry.logprob) >= top.get(entry.text, -1e9):
            top[entry.text] = finite(entry.logprob)
    return top


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it: a banned token's minus infinity becomes -9999."""
    return max(logprob, -9999.0)


class ChunkTemplate:
    """The chunks of one choice: everything but the text is put into bytes once."""

    __slots__ = ("_after", "_before", "_frame")

    def __init__(self, head: Head, kind: str, index: int, frame: tuple[bytes, bytes]) -> None:
        """`frame` stands around the text inside a choice: `"delta":{"content":` and `}`."""
        start = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._before = encode_json(start)[:-1] + b',"choices":[{"index":%d,' % index
        self._frame = frame
        self._after = b',"logprobs":null,"finish_reason":null}]'

    def text(self, text: str) -> bytes:
        """A chunk with new text, still open at the end for `usage`; close it with `}`."""
        before, after = self._frame
        return b"".join((self._before, before, encode_json(text), after, self._after))

    def full(
        self,
        inner: bytes,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        """A chunk with `inner` in the choice and any ending, open at the end like `text`."""
        parts = [self._before, inner, b',"logprobs":', encode_json(logprobs)]
        parts += [b',"finish_reason":', encode_json(finish_reason)]
        if stop_reason is not None:
            parts += [b',"stop_reason":', encode_json(stop_reason)]
        return b"".join((*parts, b"}]"))


def usage_chunk(head: Head, kind: str, usage: Usage) -> bytes:
    """The last chunk of a stream that was asked for usage."""
    return encode_json(
        {
            "id": head.id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "choices": [],
            "usage": usage.body(),
        }
    )


def model_card(name: str, *, created: int, max_model_len: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quire",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
        "context_length": max_model_len,
    }
