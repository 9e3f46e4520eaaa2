"""A Hugging Face tokenizer folder, without `transformers`.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template. Ids
equal those of `transformers` (tests compare). Thread-safe: encoding releases the interpreter lock,
so long prompts are tokenized in worker threads.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire.text.chat_template import ChatTemplate
from quire.text.control_tokens import ControlTokens
from quire.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, byte_level_alphabet
from quire.text.folder import eos_token_ids, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quire.text.chat_template import ChatRequest
    from quire.text.detokenizer import Detokenizer

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

# one text per call is never worth a thread pool of the library's own, and the pool's locks do not
# survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Text to token ids and back, for one model.

    Raises FileNotFoundError without tokenizer.json and ValueError when a file is malformed or the
    chat template does not compile. `chat_template` overrides the model's: a file, or the text.
    """

    def __init__(self, folder: Path, *, chat_template: str | None = None) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        self._config = read_json(folder, "tokenizer_config.json")
        self.special_tokens = _special_tokens(folder, self._config)
        """Special tokens by name ("bos_token": "<s>"), as chat templates see them."""
        self._backend = _load_backend(path, self._config, self.special_tokens)
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Ids that `skip_special_tokens` leaves out of text."""
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        """One more than the largest token id."""
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.chat = ChatTemplate.load(folder, self._config, chat_template)
        """None when the model has no chat template."""
        literal = self.chat.literal_text if self.chat else ""
        self._control = ControlTokens(self._backend, literal)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a sequence: the model's, else the tokenizer's."""
        ids = eos_token_ids(self.folder)
        if not ids and self.eos_token_id is not None:
            return [self.eos_token_id]
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens spelled in it become those tokens."""
        return _encode(self._backend, text, add_special_tokens)

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """Ids of the rendered conversation.

        Only the template writes control tokens: those spelled in the caller's texts are encoded as
        the characters they are, so no message can end itself and speak in another role.
        Raises ApiError when the template refuses the messages or the model has none.
        """
        template = self._require_chat()
        marked = self._control.mark(request.texts())
        if marked is None:
            return _encode(self._backend, template.render(request, self.special_tokens), False)
        return self._control.encode_rendered(
            template.render(request.with_texts(marked.apply), self.special_tokens)
        )

    def render_chat(self, request: ChatRequest) -> str:
        """The conversation as text. Raises as `encode_chat`."""
        return self._require_chat().render(request, self.special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids outside the vocabulary are left out."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental detokenizer for one choice."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(
                self._shown_bytes if skip_special_tokens else self._token_bytes
            )
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return WindowDetokenizer(self._decode_all, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, spaces included; b"" outside the vocabulary."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def token_text(self, token_id: int) -> str:
        """A token on its own as text, U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def bad_words_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences that spell `words` at the start of a text and, after a space, inside it.

        As in vLLM, so that parameters carry over.
        """
        sequences: list[list[int]] = []
        for word in words:
            start = self.encode(word.lstrip(), add_special_tokens=False)
            inside = self.encode(" " + word.lstrip(), add_special_tokens=False)
            if start:
                sequences.append(start)
            if inside and start and inside[0] != start[0] and len(inside) == len(start):
                sequences.append(inside)
        return sequences

    def _require_chat(self) -> ChatTemplate:
        if self.chat is None:
            # imported late: errors are the API's words, and only this path needs them
            from quire.api.errors import ApiError

            message = "This model has no chat template; use /v1/completions."
            raise ApiError("invalid_value", message, "messages")
        return self.chat

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return [part.get("type") for part in parts] == ["ByteLevel"]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        piece_bytes = _byte_level_bytes() if self._is_byte_level else _sentencepiece_bytes
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for piece, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token_id in added and not self._is_byte_level:
                table[token_id] = piece.encode()
            else:
                table[token_id] = piece_bytes(piece)
        return table

    @cached_property
    def _shown_bytes(self) -> list[bytes]:
        table = list(self._token_bytes)
        for token_id in self.special_ids:
            table[token_id] = b""
        return table


def _encode(backend: Backend, text: str, add_special_tokens: bool) -> list[int]:
    # the batch call, of one: `encode` holds the interpreter lock for the whole text
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


def _load_backend(path: Path, config: dict[str, Any], named: dict[str, str]) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            flags = {k: entry.get(k, False) for k in ("single_word", "lstrip", "rstrip", "special")}
            token = AddedToken(entry["content"], normalized=entry.get("normalized", True), **flags)
            backend.add_tokens([token])
            known[token.content] = token
    # as transformers does: what the configuration names as special is special
    missing = [t for t in named.values() if t not in known or not known[t].special]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
    return backend


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    merged = read_json(folder, "special_tokens_map.json") | config
    tokens: dict[str, str] = {}
    for name in NAMED_TOKENS:
        value = merged.get(name)
        if isinstance(value, dict):  # a serialized AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _byte_level_bytes() -> Any:
    alphabet = byte_level_alphabet()

    def piece_bytes(piece: str) -> bytes:
        # as the library's decoder: a piece with any other character stands for itself
        if all(char in alphabet for char in piece):
            return bytes(alphabet[char] for char in piece)
        return piece.encode()

    return piece_bytes


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
