"""What a draw of tokens needs, as flat arrays: the contract between engine and samplers.

A drawn token is a function of (logits, parameters, seed, choice, position) alone. The noise is
counter-based (Philox-4x32-10, Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"),
and drawing is Gumbel-max: argmax over the kept tokens of logit / temperature + noise. So the batch
that a token shares, a preemption, a migration or a speculative guess do not change what is drawn.

    key      = (seed low 32, seed high 32)
    counter  = (position, choice, token_id // 4, 0); token_id % 4 picks the output word
    uniform  = min((word >> 1) * 2**-31 + 2**-32, 1 - 2**-24), float32 (fine-grained near 0)
    noise    = -log(-log1p(-uniform)), rounded once to float32; in [-2.82, 22.19]
    score    = (logit - largest logit) / temperature + noise

Order of the filters, per draw: edits (allowed mask, bias, repetition, then frequency and presence
penalties, over a private copy of the row), temperature, top-k, top-p, min-p, draw. Greedy
(temperature below 1e-5) is argmax after the edits; ties go to the lowest token id everywhere. NaN
counts as -inf, +inf as the largest float; token ids outside the vocabulary in histories and biases
are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAW_RULE = np.dtype(
    [
        ("temperature", np.float32),  # 0 = greedy
        ("top_k", np.int32),  # 0 = all
        ("top_p", np.float32),  # in (0, 1]
        ("min_p", np.float32),  # in [0, 1]; keep tokens of probability >= min_p * the largest
        ("seed", np.uint64),
        ("choice", np.uint32),  # index of the parallel sample
    ],
    align=True,
)
"""How a sequence's tokens are drawn: the same from its first to its last. `DrawRule` of
csrc/cpu/sample.h."""


@dataclass(frozen=True)
class LogitEdits:
    """Changes to single logits, sparse over the N draws of a batch (CSR-like offsets)."""

    repetition: np.ndarray  # [N] float32; logit / r if positive else * r, for tokens in the history
    frequency: np.ndarray  # [N] float32; minus f * count in the output part of the history
    presence: np.ndarray  # [N] float32; minus p if in the output part of the history
    history: np.ndarray  # [sum] int32 token ids, prompt then output, of each draw
    history_start: np.ndarray  # [N + 1] int32
    num_prompt: np.ndarray  # [N] int32: leading tokens of the draw's history that are prompt
    bias_ids: np.ndarray  # [sum] int32
    bias_values: np.ndarray  # [sum] float32 added to the logit; -inf bans the token
    bias_start: np.ndarray  # [N + 1] int32
    allowed: np.ndarray  # [M, ceil(V / 32)] uint32 bit masks: bit t % 32 of word t // 32
    allowed_row: np.ndarray  # [N] int32 row of `allowed`, -1 for no restriction


@dataclass(frozen=True)
class SamplingBatch:
    """N draws from R rows of logits; several draws may share a row (n > 1)."""

    rows: np.ndarray  # [N] int32 row of the logits [R, V]
    rules: np.ndarray  # [N] DRAW_RULE
    position: np.ndarray  # [N] uint32 absolute position of the token to draw
    edits: LogitEdits | None = None
