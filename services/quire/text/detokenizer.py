"""Token ids to text, one token at a time, never emitting half a character.

Two implementations of one protocol, chosen by the tokenizer's decoder:

- byte-level BPE (GPT-2, Llama 3, Qwen, ...): a token is a fixed byte string, so decoding is one
  table look-up and an incremental UTF-8 decoder;
- everything else (SentencePiece-style Llama 2, Gemma, WordPiece, ...): a token's text depends on
  its neighbours (leading spaces, byte fallback), so a short window of recent ids is decoded again
  and what is new is emitted.

Both cost O(1) per token and both give, joined, what decoding the whole list would give.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""Tokens a window may hold back waiting for the rest of a character (UTF-8 needs at most 4)."""

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """Turns one choice's token ids into text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""

    def flush(self) -> str:
        """What is still held back, at the end of the choice: U+FFFD for a broken character."""


class ByteLevelDetokenizer:
    """Decodes tokens that are byte strings. `pieces[id]` is the token's bytes, b"" if skipped."""

    __slots__ = ("_pieces", "_utf8")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = _new_utf8_decoder("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        # a model may draw ids beyond the tokenizer's vocabulary (padded embeddings): no text
        if token_id >= len(self._pieces):
            return ""
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        """What is still held back."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes with any decoder, by comparing the decoded window before and after a token.

    ids:   ... emitted ... | context | held back |        window = context + held back
    The context's text is already out; it only gives the decoder something to lean on.
    """

    __slots__ = ("_context_len", "_context_text", "_decode", "_skipped", "_window")

    def __init__(
        self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int] | set[int]
    ) -> None:
        self._decode = decode
        # skipped ids never enter the window: a window of nothing else would lose its context
        self._skipped = skipped
        self._window: list[int] = []
        self._context_len = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._context_len
        if text.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        if len(text) <= len(self._context_text):
            return ""
        new = text[len(self._context_text) :]
        self._window = self._window[self._context_len :]
        self._context_len = len(self._window)
        self._context_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        """What is still held back."""
        text = self._decode(self._window)
        new = text[len(self._context_text) :]
        self._context_len = len(self._window)
        self._context_text = text
        return new


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet
