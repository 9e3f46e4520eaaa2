"""Drawing tokens without filters: Philox noise and argmax in two passes over the logits.

The same draws, bit for bit, as `torch_sampler`, which documents the noise. No softmax, no sort, no
noise in memory: a pass for the largest logit of a row, a pass for the best score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from quire.kernels.staging import put
from quire.kernels.torch_sampler import GREEDY_BELOW

if TYPE_CHECKING:
    from quire.kernels.sampling import SamplingBatch

MAX_PARTS = 32
"""Programs per row, at most; a power of two."""
BLOCK = 1024
"""Logits per turn of a program; a power of two."""


@triton.jit
def _clean(x):
    """NaN counts as -inf, +inf as the largest float."""
    x = tl.where(x == x, x, float("-inf"))
    return tl.minimum(x, 3.4028234663852886e38)


@triton.jit
def _gumbel(word):
    """Float32 noise of uint32 words."""
    uniform = (word >> 1).to(tl.int32).to(tl.float32) * 2.0**-31 + 2.0**-32
    uniform = tl.minimum(uniform, 1 - 2.0**-24).to(tl.float64)
    # log1p(-u) by the logarithm of the rounded 1 - u and what the rounding did (Kahan)
    rest = 1.0 - uniform
    log1p = tl.log(rest) * (uniform / (1.0 - rest))
    return -tl.log(-log1p).to(tl.float32)


@triton.jit
def _largest_kernel(
    logits_ptr,  # [R, V]
    draws_ptr,  # [6, N], see `draw`
    largest_ptr,  # [N, PARTS]
    vocabulary,
    turns,
    stride_row,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draw, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(draws_ptr + draw).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for turn in range(turns):
        token = (part * turns + turn) * BLOCK + i
        at = logits_ptr + row * stride_row + token
        x = tl.load(at, mask=token < vocabulary, other=float("-inf"))
        largest = tl.maximum(largest, _clean(x.to(tl.float32)))
    tl.store(largest_ptr + draw * PARTS + part, tl.max(largest, 0))


@triton.jit
def _score_kernel(
    logits_ptr,  # [R, V]
    draws_ptr,  # [6, N]
    largest_ptr,  # [N, PARTS]
    best_ptr,  # [N, PARTS] best score of each part
    token_ptr,  # [N, PARTS] its token
    num_draws,
    vocabulary,
    turns,
    stride_row,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draw, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(draws_ptr + draw).to(tl.int64)
    temperature = tl.load(draws_ptr + num_draws + draw).to(tl.float32, bitcast=True)
    low = tl.load(draws_ptr + 2 * num_draws + draw).to(tl.uint32, bitcast=True)
    high = tl.load(draws_ptr + 3 * num_draws + draw).to(tl.uint32, bitcast=True)
    choice = tl.load(draws_ptr + 4 * num_draws + draw).to(tl.uint32, bitcast=True)
    position = tl.load(draws_ptr + 5 * num_draws + draw).to(tl.uint32, bitcast=True)
    largest = tl.max(tl.load(largest_ptr + draw * PARTS + tl.arange(0, PARTS)), 0)
    # without any candidate: -inf - -inf would be NaN
    shift = tl.where(largest == float("-inf"), 0.0, largest)

    # one Philox call gives the noise of four consecutive tokens
    lane = tl.arange(0, BLOCK // 4)
    best = tl.full([BLOCK // 4], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK // 4], 0x7FFFFFFF, tl.int32)
    for turn in range(turns):
        group = (part * turns + turn) * (BLOCK // 4) + lane
        counter = group.to(tl.uint32, bitcast=True)
        nothing = counter * 0
        words = tl.philox_impl(
            nothing + position, nothing + choice, counter, nothing, nothing + low, nothing + high
        )
        for word in tl.static_range(4):
            token = group * 4 + word
            at = logits_ptr + row * stride_row + token
            x = tl.load(at, mask=token < vocabulary, other=float("-inf"))
            x = _clean(x.to(tl.float32))
            if temperature == 0.0:
                score = x
            else:
                score = tl.div_rn(x - shift, temperature) + _gumbel(words[word])
            is_better = score > best
            best = tl.where(is_better, score, best)
            best_token = tl.where(is_better, token, best_token)
    part_best = tl.max(best, 0)
    tl.store(best_ptr + draw * PARTS + part, part_best)
    # the lowest id of equal scores
    part_token = tl.min(tl.where(best == part_best, best_token, 0x7FFFFFFF), 0)
    tl.store(token_ptr + draw * PARTS + part, part_token)


@triton.jit
def _choose_kernel(
    largest_ptr,  # [N, PARTS]
    best_ptr,  # [N, PARTS]
    token_ptr,  # [N, PARTS]
    out_ptr,  # [2, N] token, and whether there was none to draw
    num_draws,
    PARTS: tl.constexpr,
):
    draw = tl.program_id(0)
    at = draw * PARTS + tl.arange(0, PARTS)
    best = tl.load(best_ptr + at)
    token = tl.min(tl.where(best == tl.max(best, 0), tl.load(token_ptr + at), 0x7FFFFFFF), 0)
    is_invalid = tl.max(tl.load(largest_ptr + at), 0) == float("-inf")
    tl.store(out_ptr + draw, tl.where(is_invalid, 0, token))
    tl.store(out_ptr + num_draws + draw, is_invalid.to(tl.int32))


def is_plain(batch: SamplingBatch) -> bool:
    """No draw of the batch edits or filters its logits."""
    rules = batch.rules
    filters = rules["top_k"].any() or rules["min_p"].any() or (rules["top_p"] < 1).any()
    return batch.edits is None and not filters


def draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Tokens of a plain batch, and where there was no candidate: int32 [2, N] on the device."""
    num_draws, vocabulary = len(batch.rows), logits.shape[1]
    rules = batch.rules
    temperature = np.where(rules["temperature"] < GREEDY_BELOW, np.float32(0), rules["temperature"])
    seed = np.ascontiguousarray(rules["seed"]).view(np.int32).reshape(-1, 2)  # little-endian
    fields = (
        batch.rows,
        temperature.astype(np.float32).view(np.int32),
        seed[:, 0],
        seed[:, 1],
        rules["choice"].view(np.int32),
        batch.position.view(np.int32),
    )
    [draws] = put([np.stack(fields)], logits.device)
    parts = min(MAX_PARTS, triton.next_power_of_2(triton.cdiv(vocabulary, BLOCK)))
    turns = triton.cdiv(vocabulary, parts * BLOCK)
    largest, best = logits.new_empty((2, num_draws, parts), dtype=torch.float32)
    tokens = torch.empty((num_draws, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty((2, num_draws), dtype=torch.int32, device=logits.device)
    sizes = (vocabulary, turns, logits.stride(0))
    grid = (num_draws, parts)
    _largest_kernel[grid](logits, draws, largest, *sizes, PARTS=parts, BLOCK=BLOCK)
    _score_kernel[grid](
        logits, draws, largest, best, tokens, num_draws, *sizes, PARTS=parts, BLOCK=BLOCK
    )
    _choose_kernel[(num_draws,)](largest, best, tokens, out, num_draws, PARTS=parts, num_warps=1)
    return out
