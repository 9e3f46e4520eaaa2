"""Count-based language models: the baselines beside which the model card puts the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from quire.demo.tokens import Tokens

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DISCOUNT = 0.75


def unigram_probabilities(stream: Tokens, vocab_size: int) -> Floats:
    """Relative frequencies with one added to every count: [vocab_size]."""
    counts = np.bincount(stream, minlength=vocab_size) + 1.0
    probabilities: Floats = counts / counts.sum()
    return probabilities


class _Order:
    """Discounted counts of one n-gram order.

    A key is the n-gram read as a number in base vocab_size; its context is the key without the
    last digit.
    """

    def __init__(self, keys: Ints, counts: Ints, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.keys, self.counts = keys, counts
        self.contexts, first, types = np.unique(
            keys // vocab_size, return_index=True, return_counts=True
        )
        self.totals = np.add.reduceat(counts, first)  # [num_contexts]
        self.backoff = DISCOUNT * types / self.totals  # [num_contexts]

    def probabilities(self, keys: Ints, lower: Floats) -> Floats:
        """Interpolate this order's estimates of the keys [N] with the lower order's [N]."""
        place, is_seen = _find(self.keys, keys)
        counts = np.where(is_seen, self.counts[place], 0)
        place, is_known = _find(self.contexts, keys // self.vocab_size)
        mine = np.maximum(counts - DISCOUNT, 0.0) / self.totals[place]
        mixed: Floats = np.where(is_known, mine + self.backoff[place] * lower, lower)
        return mixed


class Trigram:
    """An interpolated Kneser-Ney 3-gram model with one fixed discount."""

    def __init__(self, stream: Tokens, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        ids = stream.astype(np.int64)
        keys = (ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:]
        trigrams, counts = np.unique(keys, return_counts=True)
        # Below the top order a count is the number of different tokens that came before.
        bigrams, predecessors = np.unique(trigrams % vocab_size**2, return_counts=True)
        self.trigrams = _Order(trigrams, counts, vocab_size)
        self.bigrams = _Order(bigrams, predecessors, vocab_size)
        last = (bigrams % vocab_size).astype(np.uint16)
        self.unigrams = unigram_probabilities(last, vocab_size)

    def probabilities(self, document: Tokens) -> Floats:
        """The probability of each token after the first, given the two before: [T - 1]."""
        ids = np.concatenate((document[:1], document)).astype(np.int64)
        bigrams = ids[1:-1] * self.vocab_size + ids[2:]
        trigrams = ids[:-2] * self.vocab_size**2 + bigrams
        lower = self.bigrams.probabilities(bigrams, self.unigrams[ids[2:]])
        return self.trigrams.probabilities(trigrams, lower)


def _find(sorted_keys: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each wanted key is, and whether it is there at all."""
    place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return place, sorted_keys[place] == wanted
