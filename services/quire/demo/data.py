"""What a training run reads: the tokenizer, the token streams, and windows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.demo.chat import conversations, small_talk
from quire.demo.corpus import load_corpus
from quire.demo.tokens import (
    Tokens,
    encode_conversations,
    encode_documents,
    shuffled_stream,
    train_tokenizer,
    with_split_tokens,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLIT_TOKEN_SHARE = 0.02
SMALL_TALK_COPIES = 40


@dataclass(frozen=True, slots=True)
class Data:
    """The tokenizer and the token streams it makes of the corpus."""

    tokenizer: Tokenizer
    train: Tokens  # [num_tokens]
    held_out: list[Tokens]  # one array per file
    held_out_chats: list[Tokens]  # one array per conversation
    held_out_bytes: int  # of the held-out files


def prepare_data(seed: int, tokenizer: Tokenizer | None = None) -> Data:
    """Read, split and tokenize the library; the same library gives the same streams.

    Without a tokenizer one is trained on the training files.
    """
    corpus = load_corpus()
    train_texts = [file.text for file in corpus.train]
    held_out_texts = [file.text for file in corpus.held_out]
    tokenizer = tokenizer or train_tokenizer(train_texts)
    chats = conversations(corpus.train, seed) + small_talk(SMALL_TALK_COPIES)
    documents = encode_documents(tokenizer, train_texts)
    documents += encode_conversations(tokenizer, chats)
    stream = shuffled_stream(documents, seed)
    return Data(
        tokenizer=tokenizer,
        train=with_split_tokens(tokenizer, stream, SPLIT_TOKEN_SHARE, seed),
        held_out=encode_documents(tokenizer, held_out_texts),
        held_out_chats=encode_conversations(tokenizer, conversations(corpus.held_out, seed)),
        held_out_bytes=sum(len(text.encode()) for text in held_out_texts),
    )


class WindowSampler:
    """Windows of the stream without repetition within an epoch, a pure function of the place."""

    def __init__(self, stream: Tokens, bos_id: int, seed: int) -> None:
        self.stream = stream
        self.bos_id = bos_id
        self.seed = seed
        self._epoch: tuple[int, int] | None = None
        self._epoch_starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, first_token: int, num_windows: int, window: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [num_windows, window], at a place counted in tokens seen.

        Each input starts with <|bos|>, be it at the start of a file or not: so a prompt may be a
        piece from the middle of one.
        """
        per_epoch = self._windows_per_epoch(window)
        first = first_token // window
        rows = np.empty((num_windows, window + 1), dtype=np.int64)
        for row, index in enumerate(range(first, first + num_windows)):
            start = self._starts(index // per_epoch, window)[index % per_epoch]
            rows[row] = self.stream[start : start + window + 1]
        rows[:, 0] = self.bos_id
        tensor = torch.from_numpy(rows)
        return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()

    def _windows_per_epoch(self, window: int) -> int:
        return (len(self.stream) - 1) // window - 1

    def _starts(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        """Shuffled window starts of an epoch, from an offset that differs by epoch."""
        if self._epoch != (epoch, window):
            rng = np.random.default_rng((self.seed, epoch, window))
            starts = rng.integers(window) + window * np.arange(self._windows_per_epoch(window))
            self._epoch_starts = rng.permutation(starts)
            self._epoch = (epoch, window)
        return self._epoch_starts
