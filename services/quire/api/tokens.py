"""Tokens with their log-probabilities, as answers show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a position."""

    token_id: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token with its log-probability, as API answers show it."""

    token_id: int
    text: str
    """The token on its own; U+FFFD where it is part of a character."""
    data: bytes
    """The bytes it stands for; those of all tokens, joined, are the text's."""
    offset: int
    """Characters of the choice's text before it."""
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    rank: int
    top: tuple[TopToken, ...]
