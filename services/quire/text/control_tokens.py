"""Keeping a caller's text from speaking as the chat template.

A template writes control tokens ("<|im_end|>") to separate roles. A user may write the same
characters. Encoding the rendered conversation naively makes both the same token, and a user can
close his message and open a system message. So:

1. `mark` wraps control tokens in the caller's texts between private-use characters;
2. the template renders the marked texts;
3. `encode_rendered` gives the template's own control tokens private names, removes the marks, and
   encodes with a twin of the tokenizer that knows the control tokens under the private names only.

The conversation is encoded in one piece, so all else (spaces at the start, merges around the text)
is what `transformers` gives. Conversations without such texts, nearly all, skip this.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable

OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Private names are OPEN + token + CLOSE; callers' texts lose these two characters."""
MARK_START, MARK_END, SEAL = "\U000f0002", "\U000f0003", "\U000f0004"
"""Around a control token that a caller wrote, and at the end of his texts; likewise."""
_RESERVED = str.maketrans("", "", OPEN + CLOSE + MARK_START + MARK_END + SEAL)
_MARKS = str.maketrans("", "", MARK_START + MARK_END + SEAL)


@dataclass(frozen=True)
class Marked:
    """How to mark a caller's texts."""

    pattern: re.Pattern[str]
    seal: bool
    """Also mark the end of every text: two of them, side by side, spell a control token."""

    def apply(self, text: str) -> str:
        """`text` with its control tokens marked."""
        clean = text.translate(_RESERVED)
        marked = self.pattern.sub(lambda m: MARK_START + m.group() + MARK_END, clean)
        return marked + SEAL if self.seal else marked


class ControlTokens:
    """The control tokens of one tokenizer and template.

    As `transformers` defines them: special tokens, and added tokens that the template writes.
    """

    def __init__(self, backend: Backend, template_text: str) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        control = {
            i: token
            for i, token in added.items()
            if token.content.strip() and (token.special or token.content in template_text)
        }
        self._ids = frozenset(control)
        longest_first = sorted((t.content for t in control.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        token = self._pattern.pattern
        # one mark is enough: a template may have cut the text at the other
        self._named = re.compile(
            f"{MARK_START}(?:{token})|(?:{token}){MARK_END}|(?P<written>{token})"
        )
        self._overlapping = re.compile(f"(?=({token}))")
        self._longest = max(map(len, longest_first), default=0)
        self.always_guard = backend.normalizer is not None and any(
            token.normalized for token in control.values()
        )
        """Control tokens are looked for after normalization, where other texts may become them."""
        self._lock = threading.Lock()
        self._twin: tuple[Backend, str | None] | None = None  # with its unknown token

    def mark(self, texts: Iterable[str]) -> Marked | None:
        """How to mark a request's texts, or None when none of them has a control token."""
        found = seal = False
        tail = ""
        for text in texts:
            if text.translate(_RESERVED) != text or self._pattern.search(text):
                found = True
            # a template may put two texts side by side
            head = text[: self._longest]
            seal = seal or self._straddles(tail, head)
            tail = (tail + head if len(text) < self._longest else text)[-self._longest :]
        return Marked(self._pattern, seal) if found or seal or self.always_guard else None

    def _straddles(self, tail: str, head: str) -> bool:
        matches = self._overlapping.finditer(tail + head)
        return any(m.start() < len(tail) < m.end(1) for m in matches)

    def encode_rendered(self, rendered: str) -> list[int]:
        """Ids of a conversation rendered from marked texts.

        Raises ApiError when the vocabulary spells a control token even from plain text.
        """
        named = self._named.sub(
            lambda m: f"{OPEN}{m['written']}{CLOSE}" if m["written"] else m.group(), rendered
        )
        plain = named.translate(_MARKS)
        twin, unknown = self._guarded()
        (encoding,) = twin.encode_batch_fast([plain], add_special_tokens=False)
        # the unknown token is not counted: plain text may well become it
        unknown_id = -1 if unknown is None else twin.token_to_id(unknown)
        written = plain.count(OPEN) - (
            plain.count(unknown) if unknown and unknown_id in self._ids else 0
        )
        if sum(1 for i in encoding.ids if i in self._ids and i != unknown_id) != written:
            message = "The messages contain control tokens of the model."
            raise ApiError("invalid_value", message, "messages")
        return list(encoding.ids)

    def _guarded(self) -> tuple[Backend, str | None]:
        with self._lock:
            if self._twin is None:
                self._twin = self._build_twin()
            return self._twin

    def _build_twin(self) -> tuple[Backend, str | None]:
        spec = json.loads(self._backend.to_str())
        private: dict[str, str] = {}
        for entry in spec["added_tokens"]:
            if entry["id"] in self._ids:
                private[entry["content"]] = entry["content"] = f"{OPEN}{entry['content']}{CLOSE}"
        _rename(spec["model"], private)
        spec["post_processor"] = None  # would name the tokens; the template writes its own
        twin = Backend.from_str(json.dumps(spec))
        for content, name in private.items():
            if twin.token_to_id(name) != self._backend.token_to_id(content):
                raise RuntimeError(f"control token {content!r} changed its id when renamed")
        unknown = _unknown_token(spec["model"])
        return twin, unknown


def _unknown_token(model: dict[str, Any]) -> str | None:
    """What the vocabulary falls back to; Unigram names it by index, the others by text."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _rename(model: dict[str, Any], private: dict[str, str]) -> None:
    """Rename tokens in the vocabulary of a tokenizer.json model, in place."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {private.get(piece, piece): i for piece, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [piece, score]
        model["vocab"] = [[private.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in private:
        model["unk_token"] = private[model["unk_token"]]
