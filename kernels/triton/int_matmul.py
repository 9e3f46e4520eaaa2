"""Weight-only integer matmul for small batches: int4 and int8 weights, unpacked in registers.

A weight is (value - zero) * scale, with unsigned values of 4 or 8 bits and one scale, perhaps one
zero, per group along K. Packed so that what unpacking one position of consecutive words yields are
consecutive weights (a run), which a tensor core multiplies as they come:

    checkpoint  word i, position p          = weight  i * P + p                P = 8 or 4 per word
    here        word r * 16 + i, position p = weight  r * 16 P + p * 16 + i    i < 16

At these batch sizes a matmul costs what reading the weights costs, so the grid is split along K
until it fills the GPU; the last program of a column block adds the parts up, in a fixed order.
After Frantar et al., "Marlin" (2024), and Hoque et al., SplitK W4A16 (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quire.kernels.triton.attention import operand_type
from quire.kernels.triton.tuned import MatmulTiling, matmul_tiling

RUN = 16
"""Weights that come consecutively out of one position of consecutive words."""
MAX_ROWS = 64
"""Rows up to which the kernel is used; more are cheaper to multiply in the activations' type."""
MAX_COLUMN_BLOCKS = 1 << 16


@dataclass(frozen=True)
class PackedInt:
    """An integer weight [N, K] on its device, in the kernel's order."""

    words: torch.Tensor  # [N, K / P] int32
    scales: torch.Tensor  # [N, K / group], in the type of the activations
    zeros: torch.Tensor | None  # the same shape and type; None for half of the range
    bits: int
    bias: torch.Tensor | None = None  # [N]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.words.shape[0], self.words.shape[1] * (32 // self.bits)

    @property
    def group(self) -> int:
        """Weights along K that share a scale."""
        return self.shape[1] // self.scales.shape[1]


def pack_int(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bits: int = 4,
    bias: torch.Tensor | None = None,
) -> PackedInt:
    """Pack checkpoint words [N, K / P] int32 with scales [N, K / group] and zeros likewise.

    Raises ValueError for sizes that the kernel does not take.
    """
    per_word = 32 // bits
    rows, k = words.shape[0], words.shape[1] * per_word
    if bits not in (4, 8):
        raise ValueError(f"weights of 4 or 8 bits, not {bits}")
    if k % (RUN * per_word) or k % scales.shape[1] or (k // scales.shape[1]) % RUN:
        raise ValueError(
            f"K = {k} must be a multiple of {RUN * per_word}, and a group of {RUN}; "
            f"there are {scales.shape[1]} groups"
        )
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    # [N, K] values, then [N, words / 16, P, 16]
    values = ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).view(rows, -1, per_word, RUN)
    packed = torch.zeros_like(values[:, :, 0])
    for position in range(per_word):
        packed |= values[:, :, position] << (bits * position)
    if zeros is not None:
        zeros = zeros.to(scales.dtype).contiguous()
    return PackedInt(packed.flatten(1).contiguous(), scales.contiguous(), zeros, bits, bias)


@triton.jit
def _unpack(words, position: tl.constexpr, zero, BITS: tl.constexpr, OPERAND: tl.constexpr):
    """value - zero at a position of words, exactly, in OPERAND."""
    MASK: tl.constexpr = (1 << BITS) - 1
    value = (words >> (position * BITS)) & MASK
    # 2^m + value has the value in its lowest bits: no conversion of integers, which is slow
    if OPERAND == tl.bfloat16 and BITS == 4:
        return (value | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (zero + 128.0)
    elif OPERAND == tl.float16:
        return (value | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (zero + 1024.0)
    else:
        wide = (value | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        return wide.to(OPERAND) - zero


@triton.jit
def _int_matmul_kernel(
    x_ptr,  # [M, K]
    words_ptr,  # [N, K / P]
    scales_ptr,  # [N, K / GROUP]
    zeros_ptr,  # [N, K / GROUP]; unused without HAS_ZEROS
    bias_ptr,  # [N]; unused without HAS_BIAS
    out_ptr,  # [M, N]
    partial_ptr,  # [SPLIT, N, M] float32; unused with SPLIT == 1
    counters_ptr,  # [column blocks] zero; left zero
    m,
    n,
    k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    P: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 16
    SPAN: tl.constexpr = P * WORDS  # weights of a row per turn
    columns, part = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = columns * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, WORDS)
    is_row, is_column = row < m, column < n
    groups = k // GROUP
    column_at = column.to(tl.int64)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # of one group
    for turn in range(part, k // SPAN, SPLIT):
        word_at = column_at[:, None] * (k // P) + turn * WORDS + i[None, :]
        words = tl.load(words_ptr + word_at, mask=is_column[:, None], other=0)
        for position in tl.static_range(P):
            first = turn * SPAN + position * WORDS
            if position == 0 or GROUP % SPAN:
                group_at = column_at * groups + first // GROUP
                scale = tl.load(scales_ptr + group_at, mask=is_column, other=0.0).to(tl.float32)
                zero = tl.full([BLOCK_N], 1 << (BITS - 1), OPERAND)
                if HAS_ZEROS:
                    zero = tl.load(zeros_ptr + group_at, mask=is_column, other=0.0).to(OPERAND)
            # [BLOCK_N, WORDS]
            weight = _unpack(words, position, zero[:, None], BITS, OPERAND)
            # [WORDS, BLOCK_M]
            x_at = x_ptr + row[None, :] * k + first + i[:, None]
            x = tl.load(x_at, mask=is_row[None, :], other=0.0).to(OPERAND)
            product = tl.dot(weight, x, product, input_precision="ieee")
            if position == P - 1 or GROUP % SPAN:
                acc += product * scale[:, None]
                product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    is_last = True
    if SPLIT > 1:
        cell = column_at[:, None] * m + row[None, :]
        mask = is_column[:, None] & is_row[None, :]
        tl.store(partial_ptr + part * n * m + cell, acc, mask=mask)
        # every thread's part must be in memory before this program is counted
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + columns, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(SPLIT):
                at = partial_ptr + other * n * m + cell
                acc += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counters_ptr + columns, 0)
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + row[None, :] * n + column[:, None]
        out_mask = is_column[:, None] & is_row[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _dequantize_kernel(
    words_ptr,  # [N, K / P]
    scales_ptr,  # [N, K / GROUP]
    zeros_ptr,  # [N, K / GROUP]; unused without HAS_ZEROS
    out_ptr,  # [N, K]
    k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,  # weights per program
):
    P: tl.constexpr = 32 // BITS
    SPAN: tl.constexpr = 16 * P
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < k
    position, i = at % SPAN // 16, at % 16
    words = tl.load(words_ptr + row * (k // P) + at // SPAN * 16 + i, mask=mask, other=0)
    value = ((words >> (position * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    group_at = row * (k // GROUP) + at // GROUP
    if HAS_ZEROS:
        value -= tl.load(zeros_ptr + group_at, mask=mask, other=0.0).to(tl.float32)
    else:
        value -= 1 << (BITS - 1)
    weight = value * tl.load(scales_ptr + group_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * k + at, weight.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(weight: PackedInt) -> torch.Tensor:
    """The weight [N, K] in the type of its scales."""
    (n, k), block = weight.shape, 1024
    out = torch.empty((n, k), dtype=weight.scales.dtype, device=weight.words.device)
    _dequantize_kernel[(n, triton.cdiv(k, block))](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out,
        k,
        BITS=weight.bits,
        GROUP=weight.group,
        HAS_ZEROS=weight.zeros is not None,
        BLOCK=block,
    )
    return out


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros that programs of one column block count themselves with, and leave zero."""
    return torch.zeros(MAX_COLUMN_BLOCKS, dtype=torch.int32, device=device)


def int_matmul(
    x: torch.Tensor, weight: PackedInt, tiling: MatmulTiling | None = None
) -> torch.Tensor:
    """x [M, K] @ weight.T + bias: [M, N] in the type of x, which is the type of the scales.

    `tiling` overrides the choice by shape.
    """
    (m, k), n = x.shape, weight.shape[0]
    if m > MAX_ROWS:
        return F.linear(x, dequantize(weight), weight.bias)
    chosen = tiling or matmul_tiling(x.device, weight.bits, (m, n, k))
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    split = chosen.split
    partial_shape = (split, n, m) if split > 1 else (1,)
    _int_matmul_kernel[(triton.cdiv(n, chosen.block_n), split)](
        x.contiguous(),
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out if weight.bias is None else weight.bias,
        out,
        torch.empty(partial_shape, dtype=torch.float32, device=x.device),
        _counters(x.device),
        m,
        n,
        k,
        BITS=weight.bits,
        GROUP=weight.group,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=weight.bias is not None,
        OPERAND=operand_type(x.dtype),
        SPLIT=split,
        BLOCK_M=max(16, triton.next_power_of_2(m)),
        BLOCK_N=chosen.block_n,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return out
