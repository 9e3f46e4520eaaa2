"""A generation request as parsed: what is the same for chat and completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quire.gateway.fields import invalid

if TYPE_CHECKING:
    from quire.api.sampling import SamplingParams
    from quire.gateway.fields import Fields
    from quire.text.chat_template import ChatRequest

INT32_MAX = 2**31 - 1
MAX_CACHE_SALT = 256
MAX_CHOICES = 64
"""Prompts times choices of one request."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How the answer is delivered."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """Usage so far on every chunk. Clients that add chunks up get wrong totals: only when asked."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a client asks for. Prompts are not tokenized yet."""

    kind: Literal["chat", "completion"]
    prompts: list[str | list[int] | ChatRequest]
    params: SamplingParams
    max_tokens: int | None
    """None for the rest of the context, 0 to score the prompt only."""
    asked_max_tokens: bool
    """The client chose max_tokens; otherwise it gives way when the context is short."""
    delivery: StreamOptions
    num_top: int | None = None
    """Show log-probabilities, and of this many likely tokens; None for none."""
    echo: bool = False
    """The text starts with the prompt."""
    truncate_prompt: int | None = None
    """Keep this many last tokens of the prompt; -1 for what the context holds."""
    priority: int = 0
    cache_salt: str | None = None
    """Share cached prefixes only with requests that name the same one."""
    ignored: tuple[str, ...] = ()
    """Fields with no meaning here."""


def delivery(fields: Fields) -> StreamOptions:
    """`stream` and `stream_options`. Raises ApiError naming the field."""
    stream = fields.boolean("stream")
    options = fields.object("stream_options")
    if options is None:
        return StreamOptions(stream=stream)
    if not stream:
        raise invalid("stream_options", "'stream_options' needs 'stream' to be true.")
    return StreamOptions(
        stream=True,
        include_usage=options.boolean("include_usage"),
        continuous_usage=options.boolean("continuous_usage_stats"),
    )


def common(fields: Fields) -> dict[str, Any]:
    """Fields of GenerationRequest that both APIs read alike. Raises ApiError naming the field."""
    request_id = fields.string("request_id", max_length=128)
    if request_id is not None and not request_id.replace("-", "").replace("_", "").isalnum():
        raise invalid("request_id", "'request_id' may have letters, digits, '-' and '_' only.")
    return {
        "delivery": delivery(fields),
        "truncate_prompt": fields.integer("truncate_prompt_tokens", -1, INT32_MAX),
        "cache_salt": _cache_salt(fields),
        "priority": fields.integer("priority", -INT32_MAX - 1, INT32_MAX) or 0,
    }


def _cache_salt(fields: Fields) -> str | None:
    salt = fields.string("cache_salt", max_length=MAX_CACHE_SALT)
    if salt == "":
        raise invalid("cache_salt", "'cache_salt' must not be empty.")
    return salt
