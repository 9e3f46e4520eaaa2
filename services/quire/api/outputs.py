"""Result objects of the Python API, with vLLM's names and fields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position."""

    logprob: float
    rank: int | None = None
    """1 for the most likely token."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One choice of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token: the drawn token and the most likely ones, by token id."""
    finish_reason: str | None = None
    """stop or length."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the choice; None for end-of-sequence."""


@dataclass
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token, None for the first."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache."""
