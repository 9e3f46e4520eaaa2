"""The tokenizer, and the token streams which training and evaluation read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quire.demo.chat import Message, render

if TYPE_CHECKING:
    from collections.abc import Iterable

Tokens = npt.NDArray[np.uint16]

VOCAB_SIZE = 8192
BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIALS = (BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>", END)

# Python splits well where its layout does:
#   a word with the one character before it     " return", ".join", "_name", "(self"
#   up to three digits                          " 1", "404"
#   a run of punctuation                        "):", " ==", "([])"
#   newlines with the indentation that follows  "\n        "
#   spaces within a line, less the last one     "  " of "x   = 1"
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[\r\n]+[ \t]*"
    r"|[^\S\r\n]+(?!\S)"
    r"|\s+"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens; the special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = special_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token, which must exist."""
    token_id: int | None = tokenizer.token_to_id(text)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {text}")
    return token_id


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    """Each text as <|bos|> text <|eos|>."""
    eos_id = special_id(tokenizer, EOS)
    encodings = tokenizer.encode_batch_fast(texts)
    return [np.array([*encoding.ids, eos_id], dtype=np.uint16) for encoding in encodings]


def encode_conversations(tokenizer: Tokenizer, chats: list[list[Message]]) -> list[Tokens]:
    """Each conversation as its rendered text followed by <|eos|>."""
    texts = [render(chat) + EOS for chat in chats]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def shuffled_stream(documents: list[Tokens], seed: int) -> Tokens:
    """All documents in a seeded random order, end to end: [num_tokens]."""
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[index] for index in order])


def with_split_tokens(tokenizer: Tokenizer, stream: Tokens, share: float, seed: int) -> Tokens:
    """Write a random share of the tokens that can be cut (`cuts`) as two pieces.

    A prompt may end in a newline, a space or a dot. The text has these in one token with what
    follows ("\\n    ", " word", ".join"), so that without this the model has not learnt what can
    come after them.
    """
    pieces = [_encoded_cuts(tokenizer, token_id) for token_id in range(tokenizer.get_vocab_size())]
    num_cuts = np.array([len(cut) for cut in pieces])
    rng = np.random.default_rng(seed)
    chosen = (rng.random(len(stream)) < share) & (num_cuts[stream] > 0)
    parts, done = [], 0
    for position in np.flatnonzero(chosen).tolist():
        choices = pieces[stream[position]]
        parts += [stream[done:position], choices[rng.integers(len(choices))]]
        done = position + 1
    return np.concatenate([*parts, stream[done:]])


def cuts(text: str) -> list[tuple[str, str]]:
    """The places where a prompt may well end within this token, as (before, after)."""
    num_newlines = len(text) - len(text.lstrip("\r\n"))
    if num_newlines:
        ends = range(1, min(num_newlines + 1, len(text)))
    else:
        is_word_after_sign = text[1:].isalnum() and not text[:1].isalnum()
        ends = range(1, 2 if is_word_after_sign else 1)
    return [(text[:end], text[end:]) for end in ends]


def _encoded_cuts(tokenizer: Tokenizer, token_id: int) -> list[Tokens]:
    """The cuts of a token, each as the ids of both pieces."""

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    text = tokenizer.decode([token_id])  # empty for special tokens
    found = cuts(text) if "\ufffd" not in text else []
    return [np.array(ids(before) + ids(after), dtype=np.uint16) for before, after in found]
