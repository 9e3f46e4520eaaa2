"""Log-probabilities of a prompt's own tokens, in the shapes the APIs show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.api.openai import finite
from quire.api.tokens import TokenText, TopToken

if TYPE_CHECKING:
    from quire.gateway.generation import Generation
    from quire.proto.common_pb2 import TokenLogprob
    from quire.text.tokenizer import Tokenizer


def prompt_tokens(generation: Generation, prompt: int) -> list[TokenText]:
    """The prompt's tokens with scores and offsets, for echo. The first has no score."""
    tokenizer = generation.tokenizer
    ids = generation.prompts[prompt].token_ids
    scores = generation.prompt_scores.get(prompt, ())
    detokenizer = tokenizer.detokenizer()
    offset = 0
    made = []
    for i, token_id in enumerate(ids):
        score = scores[i - 1] if 0 < i <= len(scores) else None
        made.append(_token(tokenizer, token_id, offset, score))
        offset += len(detokenizer.push(token_id))
    return made


def _token(
    tokenizer: Tokenizer, token_id: int, offset: int, score: TokenLogprob | None
) -> TokenText:
    text, data = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    if score is None:
        return TokenText(token_id, text, data, offset, None, 0, ())
    pairs = zip(score.top_ids, score.top_logprobs, strict=True)
    top = tuple(TopToken(i, tokenizer.token_text(i), tokenizer.token_bytes(i), p) for i, p in pairs)
    return TokenText(token_id, text, data, offset, score.logprob, score.rank, top)


def prompt_logprobs(generation: Generation, prompt: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: None for the first token, then token id -> score."""
    tokenizer = generation.tokenizer
    ids = generation.prompts[prompt].token_ids
    entries: list[dict[str, Any] | None] = [None]
    for token_id, score in zip(ids[1:], generation.prompt_scores.get(prompt, ()), strict=False):
        ranked = enumerate(zip(score.top_ids, score.top_logprobs, strict=True), start=1)
        entry = {str(i): _entry(tokenizer, i, p, rank) for rank, (i, p) in ranked}
        entry[str(token_id)] = _entry(tokenizer, token_id, score.logprob, score.rank)
        entries.append(entry)
    return entries


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {
        "logprob": finite(logprob),
        "rank": rank,
        "decoded_token": tokenizer.token_text(token_id),
    }
