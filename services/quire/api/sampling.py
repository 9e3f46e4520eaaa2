"""Sampling parameters under the names vLLM's users know, validated in one place.

Used by `LLM.generate`, by the gateway (from OpenAI requests) and by the engine.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

from quire.api.errors import ApiError, echo

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
GREEDY_BELOW = 1e-5
"""A temperature below this counts as 0: dividing by it would overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of a request. Raises ApiError naming the field when invalid."""

    n: int = 1
    """Parallel choices drawn for the prompt."""
    max_tokens: int | None = 16
    """Most tokens to generate per choice; None for up to the model's context."""
    min_tokens: int = 0
    """Tokens generated before end-of-sequence or a stop may end the choice."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 or -1 for all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Draw from tokens at least min_p times as likely as the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of tokens that occur in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit once per occurrence in the output."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    seed: int | None = None
    """Makes the draws reproducible; None draws one."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the choice; not part of its text."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the choice."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of single tokens, -100 to 100."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens may be drawn."""
    bad_words: list[str] = field(default_factory=list)
    """Texts that may not be completed; needs a tokenizer, so the text layer turns it into ids."""
    bad_words_ids: list[list[int]] = field(default_factory=list)
    """Token sequences whose last token may not follow the others."""
    logprobs: int | None = None
    """Return the log-probability of each token, and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """Likewise for the prompt's tokens."""
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        elif self.stop is None:
            object.__setattr__(self, "stop", [])
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_counts(self)
        _check_reals(self)
        _check_lists(self)

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """The logits depend on the tokens so far."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def edits_logits(self) -> bool:
        """Tokens are not drawn from the raw logits, min_tokens aside."""
        return (
            self.has_penalties
            or bool(self.logit_bias)
            or bool(self.bad_words_ids)
            or self.allowed_token_ids is not None
        )


def new_seed() -> int:
    """A seed for a request that came without one: 63 random bits."""
    return secrets.randbits(63)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError("invalid_type", f"'{name}' must be an integer, not {echo(value)}.", name)
    if value < low:
        message = f"Invalid '{name}': {value} is below the minimum of {low}."
        raise ApiError("integer_below_min_value", message, name)
    if value > high:
        message = f"Invalid '{name}': {echo(value)} is above the maximum of {high}."
        raise ApiError("integer_above_max_value", message, name)


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError("invalid_type", f"'{name}' must be a number, not {echo(value)}.", name)
    if not math.isfinite(value):
        raise ApiError("invalid_value", f"'{name}' must be finite, not {value}.", name)
    if value < low or (open_low and value == low):
        bound = f"greater than {low:g}" if open_low else f"at least {low:g}"
        raise ApiError(
            "decimal_below_min_value", f"Invalid '{name}': {value} must be {bound}.", name
        )
    if value > high:
        message = f"Invalid '{name}': {value} is above the maximum of {high:g}."
        raise ApiError("decimal_above_max_value", message, name)


def _check_counts(p: SamplingParams) -> None:
    _integer("n", p.n, 1, MAX_N)
    if p.max_tokens is not None:
        _integer("max_tokens", p.max_tokens, 1, 2**31 - 1)
    _integer("min_tokens", p.min_tokens, 0, 2**31 - 1)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        message = f"'min_tokens' ({p.min_tokens}) is above 'max_tokens' ({p.max_tokens})."
        raise ApiError("integer_above_max_value", message, "min_tokens")
    _integer("top_k", p.top_k, 0, 2**31 - 1)
    if p.seed is not None:
        _integer("seed", p.seed, -(2**63), 2**64 - 1)
    for name, value in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)):
        if value is not None:
            _integer(name, value, 0, MAX_LOGPROBS)


def _check_reals(p: SamplingParams) -> None:
    _real("temperature", p.temperature, 0, 2)
    _real("top_p", p.top_p, 0, 1, open_low=True)
    _real("min_p", p.min_p, 0, 1)
    _real("presence_penalty", p.presence_penalty, -2, 2)
    _real("frequency_penalty", p.frequency_penalty, -2, 2)
    _real("repetition_penalty", p.repetition_penalty, 0, 1e6, open_low=True)


def _check_lists(p: SamplingParams) -> None:
    _length("stop", p.stop, MAX_STOP_STRINGS)
    for i, text in enumerate(p.stop):
        _text(f"stop[{i}]", text)
    _length("stop_token_ids", p.stop_token_ids, MAX_STOP_TOKEN_IDS)
    _length("bad_words", p.bad_words, MAX_BAD_WORDS)
    for i, text in enumerate(p.bad_words):
        _text(f"bad_words[{i}]", text)
    _length("logit_bias", p.logit_bias, MAX_LOGIT_BIAS)
    for value in p.logit_bias.values():
        _real("logit_bias", value, -100, 100)
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        message = "'allowed_token_ids' must name at least one token."
        raise ApiError("empty_array", message, "allowed_token_ids")


def _length(name: str, value: object, limit: int) -> None:
    if not isinstance(value, list | dict | tuple):
        raise ApiError("invalid_type", f"'{name}' must be a list, not {echo(value)}.", name)
    if len(value) > limit:
        message = f"'{name}' has {len(value)} entries; at most {limit} are allowed."
        raise ApiError("array_above_max_length", message, name)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ApiError("invalid_type", f"'{name}' must be a string, not {echo(value)}.", name)
    if not value:
        raise ApiError("invalid_value", f"'{name}' must not be empty.", name)
    if len(value) > MAX_STOP_LENGTH:
        message = f"'{name}' has {len(value)} characters; at most {MAX_STOP_LENGTH} are allowed."
        raise ApiError("string_above_max_length", message, name)


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise ApiError when a parameter names a token outside the vocabulary."""
    named = (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", params.logit_bias),
        ("bad_words", [t for ids in params.bad_words_ids for t in ids]),
    )
    for name, ids in named:
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                message = f"'{name}' names token {token_id}; the vocabulary has {vocab_size}."
                raise ApiError("invalid_value", message, name)
