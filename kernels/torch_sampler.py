"""The sampling contract of `sampling` in vectorised torch, on any device: the truth.

The noise of a draw is made exactly so, in every implementation:

    words    = Philox-4x32-10, counter and key as `sampling` says
    uniform  = min((word >> 1) * 2**-31 + 2**-32, 1 - 2**-24), float32
    noise    = -log(-log1p(-uniform)), rounded once to float32

The uniform is fine-grained near 0, where the large noises come from: with 24 equal steps of the
simpler (word >> 8) * 2**-24 + 2**-25 a float32 rounds to 1 once in 2**24 words, and a token with
infinite noise would win one draw in a hundred at a vocabulary of 150 thousand.

Scores are (logit - largest logit) / temperature, so that a low temperature costs no precision.
Order is logit descending, then token id ascending, everywhere. Temperature below 1e-5 is greedy.

A NaN logit counts as -inf and is never drawn; +inf as the largest float32. A draw without any
candidate (all its logits NaN, banned or -inf) yields token 0 and is flagged in `invalid`: one bad
request must not take its batch down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from quire.kernels.staging import to_device

if TYPE_CHECKING:
    from quire.kernels.sampling import LogitEdits, SamplingBatch

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy."""

NEGATIVE_INFINITY = float("-inf")
LARGEST = torch.finfo(torch.float32).max
CHUNK_ELEMENTS = 1 << 22
"""Logits worked on at a time: bounds the temporaries, several float64 values each."""


# --- noise ----------------------------------------------------------------------------------------


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10: int64 words [..., 4] below 2^32 of counter [..., 4] and key [..., 2].

    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011. The leading dimensions of
    counter and key broadcast.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap; shifted and masked they still give the unsigned high half
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & mask) ^ c1 ^ k0,
            p1 & mask,
            ((p0 >> 32) & mask) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    # every word has met every word of counter and key by now, so all have the broadcast shape
    return torch.stack([c0, c1, c2, c3], dim=-1)


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Float32 noise of int64 words in [0, 2^32): between -2.82 and 22.19.

    The logarithms are float64, so that devices agree on the rounded result.
    """
    uniform = (words >> 1).float() * 2.0**-31 + 2.0**-32
    uniform = uniform.clamp(max=1 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-uniform)).float()


def noise(
    batch: SamplingBatch, draws: slice, vocabulary: int, device: torch.device
) -> torch.Tensor:
    """Noise of every token for the given draws: float32 [draws, V]."""
    seed = batch.rules["seed"][draws].astype(np.uint64)
    low, high = (seed & np.uint64(0xFFFFFFFF)), (seed >> np.uint64(32))
    # [draws, 1, 2]
    key = to_device(np.stack([low, high], -1).astype(np.int64), device)[:, None]
    groups = torch.arange(-(-vocabulary // 4), device=device)
    position, choice = (
        to_device(x[draws].astype(np.int64), device)[:, None].expand(-1, len(groups))
        for x in (batch.position, batch.rules["choice"])
    )
    # [draws, V / 4, 4]
    counter = torch.stack(
        [position, choice, groups.expand_as(position), torch.zeros_like(position)], dim=-1
    )
    return gumbel(philox(counter, key)).flatten(1)[:, :vocabulary]


# --- edits ----------------------------------------------------------------------------------------


def _flat_index(
    starts: np.ndarray, ids: np.ndarray, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """draw * V + id, int64, and whether the id is one, for each entry of ragged lists of ids."""
    draw = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    ids = ids[starts[0] : starts[-1]].astype(np.int64)
    return draw * vocabulary + ids, (ids >= 0) & (ids < vocabulary)


def _allow(logits: torch.Tensor, edits: LogitEdits, draws: slice) -> torch.Tensor:
    """Ban what a draw's mask does not allow."""
    row = edits.allowed_row[draws]
    if (row < 0).all():
        return logits
    bits = to_device(edits.allowed.view(np.int32)[row], logits.device)
    token = torch.arange(logits.shape[1], device=logits.device)
    # [draws, V]
    allowed = (bits[:, token // 32] >> (token % 32)) & 1 == 1
    unrestricted = to_device(row < 0, logits.device)[:, None]
    return logits.masked_fill(~(allowed | unrestricted), NEGATIVE_INFINITY)


def _history_counts(
    edits: LogitEdits, draws: slice, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (draw, token) of the histories as flat indices, and their output counts."""
    starts = edits.history_start[draws.start : draws.stop + 1]
    flat, known = _flat_index(starts, edits.history, vocabulary)
    place = np.arange(starts[0], starts[-1])
    is_output = place >= np.repeat(starts[:-1] + edits.num_prompt[draws], np.diff(starts))
    index, inverse = np.unique(flat[known], return_inverse=True)
    counts = np.bincount(inverse, weights=is_output[known], minlength=len(index))
    return index, counts.astype(np.float32)


def apply_edits(logits: torch.Tensor, edits: LogitEdits, draws: slice) -> torch.Tensor:
    """A copy of float32 logits [draws, V] with mask, bias and penalties applied, in this order.

    Ids outside the vocabulary (an image's placeholder in a prompt, say) are passed over.
    """
    vocabulary = logits.shape[1]
    flat = _allow(logits, edits, draws).clone().view(-1)

    starts = edits.bias_start[draws.start : draws.stop + 1]
    index, known = _flat_index(starts, edits.bias_ids, vocabulary)
    at = to_device(index[known], flat.device)
    value = to_device(edits.bias_values[starts[0] : starts[-1]][known], flat.device)
    flat.index_put_((at,), value, accumulate=True)

    index, counts = _history_counts(edits, draws, vocabulary)
    draw = index // vocabulary

    def of_draw(values: np.ndarray) -> torch.Tensor:
        return to_device(values[draws][draw], flat.device)

    at, count = to_device(index, flat.device), to_device(counts, flat.device)
    repetition = of_draw(edits.repetition)
    x = flat[at]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x - of_draw(edits.frequency) * count
    x = x - torch.where(count > 0, of_draw(edits.presence), 0.0)
    flat[at] = x
    return flat.view(-1, vocabulary)


# --- filters --------------------------------------------------------------------------------------


class _Filters(NamedTuple):
    """Columns [draws, 1] on the device."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    @classmethod
    def of(cls, batch: SamplingBatch, draws: slice, device: torch.device) -> _Filters:
        rules = batch.rules[draws]
        return cls(*(to_device(rules[name], device)[:, None] for name in cls._fields))


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Token ids [draws, V], logit descending then id ascending."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices


def _keep(logits: torch.Tensor, scores: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """Which tokens [draws, V] remain after top-k, top-p over what top-k left, and min-p."""
    order = _order(logits)
    rank = torch.arange(scores.shape[1], device=scores.device)
    weight = scores.exp().double().gather(1, order)
    weight = weight.masked_fill((filters.top_k > 0) & (rank >= filters.top_k), 0)
    # the token that crosses p stays, so compare the mass before it; the first always stays
    mass_before = weight.cumsum(1) - weight
    # top_p is float32 in the contract; the product is not rounded to it
    limit = filters.top_p.double() * weight.sum(1, keepdim=True)
    kept = (weight > 0) & ((mass_before < limit) | (filters.top_p >= 1))
    kept &= scores.exp().gather(1, order) >= filters.min_p
    return torch.zeros_like(kept).scatter(1, order, kept)


# --- entry points ---------------------------------------------------------------------------------


def _draw(logits: torch.Tensor, batch: SamplingBatch, draws: slice) -> torch.Tensor:
    """Token [draws] of clean logits [draws, V] by the rules of each draw."""
    rules = batch.rules[draws]
    greedy = ~(rules["temperature"] >= GREEDY_BELOW)
    if greedy.all():
        return _first_max(logits)
    device = logits.device
    temperature = np.where(greedy, np.float32(1), rules["temperature"])
    scores = logits - logits.amax(1, keepdim=True)
    scores /= to_device(temperature, device)[:, None]
    scores = scores.nan_to_num(nan=NEGATIVE_INFINITY, neginf=NEGATIVE_INFINITY)
    if rules["top_k"].any() or (rules["top_p"] < 1).any() or rules["min_p"].any():
        keep = _keep(logits, scores, _Filters.of(batch, draws, device))
        scores = scores.masked_fill(~keep, NEGATIVE_INFINITY)
    drawn = _first_max(scores + noise(batch, draws, logits.shape[1], device))
    return torch.where(to_device(greedy, device), _first_max(logits), drawn)


def _first_max(x: torch.Tensor) -> torch.Tensor:
    """Index [rows] of the largest value of each row; the lowest of equal ones."""
    return x.argmax(1)  # torch promises the first of equal values


def sample(
    logits: torch.Tensor, batch: SamplingBatch, invalid: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw one token for each of the N draws: int32 [N] on the device of logits [R, V].

    `invalid` bool [N], when given, is set where a draw had no candidate (its token is 0).
    """
    num_draws, vocabulary = len(batch.rows), logits.shape[1]
    tokens = torch.empty(num_draws, dtype=torch.int32, device=logits.device)
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    rows = to_device(batch.rows.astype(np.int64), logits.device)
    for start in range(0, num_draws, step):
        draws = slice(start, min(start + step, num_draws))
        chunk = logits[rows[draws]].float()
        if batch.edits is not None:
            chunk = apply_edits(chunk, batch.edits, draws)
        # adding zero turns -0 into +0, so that order by value and by bits agree
        chunk = chunk.nan_to_num(NEGATIVE_INFINITY, LARGEST, NEGATIVE_INFINITY) + 0.0
        empty = chunk.amax(1) == NEGATIVE_INFINITY
        tokens[draws] = _draw(chunk, batch, draws).masked_fill(empty, 0).int()
        if invalid is not None:
            invalid[draws] = empty
    return tokens


def draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """`sample` in one tensor, int32 [2, N]: the tokens, and where there was no candidate."""
    invalid = torch.zeros(len(batch.rows), dtype=torch.bool, device=logits.device)
    return torch.stack([sample(logits, batch, invalid), invalid.int()])


class Logprobs(NamedTuple):
    """Log-probabilities of N draws under the unedited logits, and the k likeliest tokens."""

    chosen: torch.Tensor  # [N] float32
    ranks: torch.Tensor  # [N] int32, 1 for the likeliest token
    top_ids: torch.Tensor  # [N, k] int32
    top: torch.Tensor  # [N, k] float32


def logprobs(
    logits: torch.Tensor, rows: np.ndarray, token_ids: torch.Tensor, num_top: int
) -> Logprobs:
    """Log-softmax in float32 of the raw rows [N] of logits [R, V] at token_ids [N], which are where
    the logits are.

    Ranks and top tokens are in the order of the logits, then of token ids, so that a greedy token
    has rank 1 and comes first even where two log-probabilities round to the same value.
    """
    device = logits.device
    index = to_device(np.asarray(rows).astype(np.int64), device)
    # [N, 1]
    ids = token_ids.long()[:, None]
    x = logits[index].float().nan_to_num(NEGATIVE_INFINITY, LARGEST, NEGATIVE_INFINITY) + 0.0
    largest = x.amax(1, keepdim=True)
    # summed in float64: torch's own float32 log_softmax is off by 1e-5 at large vocabularies
    log_mass = (x - largest).exp().sum(1, keepdim=True, dtype=torch.float64).log().float()
    own = x.gather(1, ids)
    token = torch.arange(x.shape[1], device=device)
    ranks = 1 + ((x > own) | ((x == own) & (token < ids))).sum(1)
    top_ids = _order(x)[:, :num_top]

    def logp(logit: torch.Tensor) -> torch.Tensor:
        return (logit - largest) - log_mass

    return Logprobs(logp(own)[:, 0], ranks.int(), top_ids.int(), logp(x.gather(1, top_ids)))
