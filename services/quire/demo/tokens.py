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


def with_split_spaces(tokenizer: Tokenizer, stream: Tokens, share: float, seed: int) -> Tokens:
    """Write a random share of the " word" tokens as " " and "word".

    A prompt that ends in a space ends in a lone " " token, which the text never has before a
    word: without this the model has not learnt what can follow.
    """
    bare = np.full(tokenizer.get_vocab_size(), -1, dtype=np.int64)
    vocab = tokenizer.get_vocab()
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")
    space_text = space[0][0]
    for text, token_id in vocab.items():
        if text.startswith(space_text) and text[len(space_text) :] in vocab:
            bare[token_id] = vocab[text[len(space_text) :]]
    chosen = np.random.default_rng(seed).random(len(stream)) < share
    positions = np.flatnonzero(chosen & (bare[stream] >= 0))
    split = stream.copy()
    split[positions] = bare[stream[positions]].astype(np.uint16)
    return np.insert(split, positions, np.uint16(vocab[space_text]))
