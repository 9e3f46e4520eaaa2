"""Logit edits of the draws that have any: penalties, bias, banned and allowed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.kernels.sampling import LogitEdits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from quire.engine.request import Sequence


def needs_edits(seq: Sequence) -> bool:
    """The sequence's next token is not drawn from the raw logits."""
    params = seq.state.request.params
    return params.edits_logits or _num_output(seq) < params.min_tokens


def build_edits(seqs: Seq[Sequence], vocab_size: int) -> LogitEdits:
    """Edits of one draw per entry of `seqs`; entries that need none get neutral values. Those that
    draw by history have no token pending."""
    bias = [list(_biases(seq)) for seq in seqs]
    histories = [seq.tokens if seq.state.request.params.has_penalties else [] for seq in seqs]
    masks = [_mask(seq, vocab_size) for seq in seqs]
    present = [m for m in masks if m is not None]
    rows = np.full(len(seqs), -1, np.int32)
    rows[[i for i, m in enumerate(masks) if m is not None]] = np.arange(len(present))
    words = (vocab_size + 31) // 32
    params = [seq.state.request.params for seq in seqs]
    return LogitEdits(
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        history=np.array([t for tokens in histories for t in tokens], np.int32),
        history_start=_starts(histories),
        num_prompt=np.array(
            [seq.num_prompt if h else 0 for seq, h in zip(seqs, histories, strict=True)], np.int32
        ),
        bias_ids=np.array([t for entries in bias for t, _ in entries], np.int32),
        bias_values=np.array([v for entries in bias for _, v in entries], np.float32),
        bias_start=_starts(bias),
        allowed=np.stack(present) if present else np.zeros((0, words), np.uint32),
        allowed_row=rows,
    )


def _num_output(seq: Sequence) -> int:
    """Output tokens before the one to draw."""
    return seq.num_planned - seq.num_prompt


def _biases(seq: Sequence) -> Iterator[tuple[int, float]]:
    params = seq.state.request.params
    yield from params.logit_bias.items()
    if _num_output(seq) < params.min_tokens:
        for token in sorted(seq.state.stop_token_ids):
            yield token, -np.inf
    output = seq.tokens[seq.num_prompt :]
    for word in params.bad_words_ids:
        head = word[:-1]
        if not head or output[-len(head) :] == head:
            yield word[-1], -np.inf


def _mask(seq: Sequence, vocab_size: int) -> np.ndarray | None:
    """[ceil(V / 32)] uint32 bits of the allowed tokens."""
    allowed = seq.state.request.params.allowed_token_ids
    if allowed is None:
        return None
    bits = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def _starts(lists: Seq[Seq[object]]) -> np.ndarray:
    """[N + 1] int32 offsets of the concatenated lists."""
    return np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int32)
