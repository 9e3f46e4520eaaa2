"""Prompts to token ids: in threads when they are long, checked against the model's context."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.text.chat_template import ChatRequest

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from quire.gateway.request import GenerationRequest
    from quire.gateway.served_model import ServedModel
    from quire.text.tokenizer import Tokenizer

INLINE_CHARS = 2048
"""Texts up to this length are tokenized on the event loop (a fraction of a millisecond)."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be submitted."""

    token_ids: list[int]
    text: str
    """For echo; empty when the prompt is not echoed."""
    max_tokens: int
    """Output tokens: what was asked for, or the rest of the context; 0 to score only."""


async def encode_prompts(
    request: GenerationRequest, served: ServedModel, threads: Executor
) -> list[Prompt]:
    """The request's prompts, tokenized.

    Raises ApiError: context_length_exceeded, or what the chat template says.
    """

    def encode() -> list[Prompt]:
        return [_prompt(request, source, served) for source in request.prompts]

    if sum(map(_num_chars, request.prompts)) <= INLINE_CHARS:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(threads, encode)


def _num_chars(source: str | list[int] | ChatRequest) -> int:
    if isinstance(source, ChatRequest):
        return sum(map(len, source.texts()))
    return len(source)


def _prompt(
    request: GenerationRequest, source: str | list[int] | ChatRequest, served: ServedModel
) -> Prompt:
    ids = encode(served.tokenizer, source)
    limit = served.info.max_model_len
    if request.truncate_prompt is not None:
        keep = limit - 1 if request.truncate_prompt == -1 else request.truncate_prompt
        ids = ids[max(len(ids) - keep, 0) :]
    name = "messages" if request.kind == "chat" else "prompt"
    if not ids:
        raise ApiError("invalid_value", f"'{name}' has no tokens.", name)
    max_tokens = _max_tokens(request, len(ids), limit, name)
    text = ""
    if request.echo:
        text = source if isinstance(source, str) else served.tokenizer.decode(ids)
    return Prompt(ids, text, max_tokens)


def encode(tokenizer: Tokenizer, source: str | list[int] | ChatRequest) -> list[int]:
    """Token ids of one prompt."""
    if isinstance(source, ChatRequest):
        return tokenizer.encode_chat(source)
    return tokenizer.encode(source) if isinstance(source, str) else source


def _max_tokens(request: GenerationRequest, prompt_len: int, limit: int, name: str) -> int:
    room = limit - prompt_len
    least = max(1, request.params.min_tokens)
    wanted = least if request.max_tokens is None else request.max_tokens
    # scoring a prompt makes the engine draw a token, which is thrown away
    needed = wanted if request.params.prompt_logprobs is None else max(wanted, 1)
    if needed <= room:
        return room if request.max_tokens is None else wanted
    if not request.asked_max_tokens and room >= least:
        return room  # the API's own default must not be what breaks a request
    part = "messages" if request.kind == "chat" else "prompt"
    # OpenAI's sentence, which litellm looks for; LangChain looks for the code, which newer SDKs
    # show only when the message has it
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt_len + wanted} tokens ({prompt_len} in the {part}, {wanted} in the completion). "
        f"Please reduce the length of the {part} or completion. (context_length_exceeded)"
    )
    raise ApiError("context_length_exceeded", message, name)
