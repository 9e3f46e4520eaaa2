"""POST /v1/completions: body -> GenerationRequest."""

from __future__ import annotations

from typing import Any

from quire.api.errors import ApiError
from quire.api.sampling import MAX_LOGPROBS, MAX_N
from quire.gateway.fields import (
    INT64_MAX,
    Fields,
    check_length,
    integer,
    invalid,
    missing,
    unsupported,
    wrong_type,
)
from quire.gateway.request import MAX_CHOICES, GenerationRequest, common
from quire.gateway.sampling_fields import HARMLESS, refuse_dangerous, sampling_params

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16


def parse_completion(
    fields: Fields, defaults: dict[str, Any], vocab_size: int
) -> GenerationRequest:
    """The request in `fields`, whose model is already taken. Raises ApiError naming the field."""
    refuse_dangerous(fields)
    _refuse(fields)
    prompts = _prompts(fields, vocab_size)
    echo = fields.boolean("echo")
    max_tokens = fields.integer("max_tokens", 0 if echo else 1, INT64_MAX)
    shared = common(fields)
    num_top = fields.integer("logprobs", 0, MAX_LOGPROBS)
    stream = shared["delivery"].stream
    if stream and fields.has("prompt_logprobs") and fields.take("prompt_logprobs") is not None:
        raise unsupported("prompt_logprobs", "not together with 'stream'.")
    n = fields.integer("n", 1, MAX_N) or 1
    best_of = fields.integer("best_of", 1, MAX_N)
    if best_of is not None and best_of != n:
        raise unsupported("best_of", "ask for n choices and pick one.")
    if n * len(prompts) > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n={n} are over {MAX_CHOICES} choices."
        raise ApiError("integer_above_max_value", message, "n")
    # an unset max_tokens is resolved when the prompt's length is known
    params = sampling_params(
        fields,
        defaults,
        logprobs=num_top,
        prompt_logprobs=num_top if echo else fields.integer("prompt_logprobs", 0, MAX_LOGPROBS),
    )
    _check_min_tokens(params.min_tokens, max_tokens)
    for key in HARMLESS:
        fields.take(key)
    return GenerationRequest(
        kind="completion",
        prompts=list(prompts),
        params=params,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        asked_max_tokens=max_tokens is not None,
        num_top=num_top,
        echo=echo,
        ignored=tuple(fields.rest()),
        **shared,
    )


def _check_min_tokens(min_tokens: int, max_tokens: int | None) -> None:
    if max_tokens and min_tokens > max_tokens:
        message = f"'min_tokens' ({min_tokens}) is above 'max_tokens' ({max_tokens})."
        raise ApiError("integer_above_max_value", message, "min_tokens")


def _refuse(fields: Fields) -> None:
    suffix = fields.string("suffix")
    if suffix:
        raise unsupported("suffix", "fill-in-the-middle is not available.")
    response_format = fields.object("response_format")
    if response_format is not None and response_format.take("type") != "text":
        raise unsupported("response_format", "structured outputs are not available.")


def _prompts(fields: Fields, vocab_size: int) -> list[str | list[int]]:
    value = fields.take("prompt")
    if value is None:
        raise missing("prompt")
    if isinstance(value, str):
        return [_text("prompt", value)]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, an array of strings, or token ids", value)
    if not value:
        raise ApiError("empty_array", "'prompt' must not be empty.", "prompt")
    if isinstance(value[0], str):
        check_length("prompt", value, MAX_PROMPTS)
        return [_text(f"prompt[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value[0], list):
        check_length("prompt", value, MAX_PROMPTS)
        return [_ids(f"prompt[{i}]", item, vocab_size) for i, item in enumerate(value)]
    return [_ids("prompt", value, vocab_size)]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string like the others", value)
    if not value:
        raise invalid(name, f"'{name}' must not be empty.")
    return value


def _ids(name: str, value: object, vocab_size: int) -> list[int]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of token ids like the others", value)
    if not value:
        raise ApiError("empty_array", f"'{name}' must not be empty.", name)
    return [integer(f"{name}[{i}]", item, 0, vocab_size - 1) for i, item in enumerate(value)]
