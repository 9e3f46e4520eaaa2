"""What every operation means, in plain torch: the truth that kernels are tested against.

Written to be read, not to be fast. Arithmetic is float64 when the activation given is float64 and
float32 otherwise; results stay in that type (callers round), only the cache rounds, to its pool's
type. Symbols in shapes are those of `ops`: T rows of the step, S sequences, L tokens of one
sequence's context, Q rows of one sequence, nh/nkv query and KV heads, hd head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.kernels.layout import BLOCK_SIZE, KvLayout, KvOrder
from quire.kernels.quantized import dequantize

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape, Rope, StepInputs
    from quire.kernels.quantized import QuantizedWeight

QkNorms = tuple[torch.Tensor, torch.Tensor, float]
"""q_norm [hd], k_norm [hd], eps: RMS normalisation of each head, before the rotation."""


def widen(x: torch.Tensor) -> torch.Tensor:
    """X in the type that the reference computes in."""
    return x if x.dtype == torch.float64 else x.float()


# --- element-wise and matrix operations -----------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, K] @ weight [N, K].T + bias [N]: [rows, N]."""
    x = widen(x)
    out = x @ weight.to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)


def fixed_point(x: torch.Tensor, block: int) -> torch.Tensor:
    """The multiples of a power of two that x [rows, K] is rounded to before it meets integers.

    Each block of a row has its own power, which makes its largest element 2^14 .. 2^15 of them.
    """
    x = widen(x)
    k = x.shape[-1]
    # [rows, blocks, block]
    blocks = torch.nn.functional.pad(x, (0, -k % block)).view(len(x), -1, block)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 15)
    multiples = (blocks / unit).round().clamp(-(2**15), 2**15 - 1)
    return (multiples * unit).flatten(1)[:, :k]


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, block: int) -> torch.Tensor:
    """x [rows, K] as fixed point times the matrix [N, K] that integers stand for: [rows, N]."""
    if weight.order is not None:
        x, weight = x[:, weight.order], replace(weight, order=None)
    return linear(fixed_point(x, block), dequantize(weight))


def gate_up_silu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T): [rows, I] (SwiGLU, Shazeer 2020)."""
    return torch.nn.functional.silu(linear(x, gate)) * linear(x, up)


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotary embedding of x [T, heads, hd] at positions [T] (Su et al., 2021).

    Half-split pairs: dimension i < rotary_dim / 2 turns with i + rotary_dim / 2. Dimensions from
    rotary_dim on pass unchanged.
    """
    x = widen(x)
    half = rope.rotary_dim // 2
    # [T, 1, half]
    cos = rope.cos[positions].to(x.dtype)[:, None]
    sin = rope.sin[positions].to(x.dtype)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def split_heads(
    qkv: torch.Tensor, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, nh, hd], k and v [T, nkv, hd] of the rows qkv [T, (nh + 2 nkv) hd]."""
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    q, k, v = torch.split(heads, counts, dim=1)
    return q, k, v


def norm_and_rotate(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    shape: AttentionShape,
    rope: Rope,
    norms: QkNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, nh, hd] and k [T, nkv, hd] normalised per head and rotated, and v as it is."""
    q, k, v = split_heads(widen(qkv), shape)
    if norms is not None:
        q_norm, k_norm, eps = norms
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    return rotate(q, positions, rope), rotate(k, positions, rope), v


# --- the cache ------------------------------------------------------------------------------------


def tile_offsets(layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where element (token, dim) lies in a K tile and in a V tile: two int64 [16, hd]."""
    tokens, dims = layout.block_size, layout.head_dim
    # [16, 1], [1, hd]
    t, d = torch.arange(tokens)[:, None], torch.arange(dims)[None]
    plain = t * dims + d
    match layout.order:
        case KvOrder.PLAIN:
            return plain, plain
        case KvOrder.LANES:
            return d * tokens + t, plain
        case KvOrder.PAIRS:
            k = (d // 2) * (2 * tokens) + 2 * t + d % 2
            return k, (t // 2) * (2 * dims) + 2 * d + t % 2


def cache_slots(inputs: StepInputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each row of the step goes: its sequence, its block and its slot in it, int64 [T]."""
    rows = np.diff(inputs.query_start)
    sequence = np.repeat(np.arange(len(rows)), rows)
    positions = inputs.positions.astype(np.int64)
    block = inputs.block_tables[sequence, positions // BLOCK_SIZE].astype(np.int64)
    return sequence, block, positions % BLOCK_SIZE


@dataclass(frozen=True)
class LayerCache:
    """The K and V of one layer inside a pool [num_blocks, nkv, layers, 2, tile]."""

    pool: torch.Tensor
    layout: KvLayout
    layer: int

    def write(self, k: torch.Tensor, v: torch.Tensor, inputs: StepInputs) -> None:
        """Store k and v [T, nkv, hd] of the step's rows, rounded to the pool's type."""
        _, blocks, slots = cache_slots(inputs)
        for offsets, values, which in zip(tile_offsets(self.layout), (k, v), (0, 1), strict=True):
            for row, (block, slot) in enumerate(zip(blocks, slots, strict=True)):
                # [nkv, tile], a view of the pool
                tiles = self.pool[block, :, self.layer, which]
                tiles[:, offsets[slot]] = values[row].to(self.pool.dtype)

    def read(self, block_table: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [length, nkv, hd] of the first `length` tokens of one sequence."""
        num_blocks = -(-length // self.layout.block_size)
        # [blocks, nkv, 2, tile]
        tiles = self.pool[torch.as_tensor(block_table[:num_blocks].astype(np.int64)), :, self.layer]
        k_at, v_at = tile_offsets(self.layout)
        # [blocks, nkv, 16, hd] -> [blocks * 16, nkv, hd]
        k = tiles[:, :, 0][..., k_at].transpose(1, 2).flatten(0, 1)
        v = tiles[:, :, 1][..., v_at].transpose(1, 2).flatten(0, 1)
        return k[:length], v[:length]


def copy_blocks(pool: torch.Tensor, pairs: np.ndarray) -> None:
    """Copy whole blocks, pairs [n, 2] of (source, destination), one after the other."""
    for source, destination in pairs.tolist():
        pool[destination] = pool[source]


# --- attention ------------------------------------------------------------------------------------


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Causal attention of the last Q tokens of one sequence: [Q, nh, hd].

    q [Q, nh, hd]; k and v [L, nkv, hd] of the whole context, the Q rows included. Query head h
    reads KV head h // (nh / nkv) (Ainslie et al., 2023, grouped queries).
    """
    q = widen(q)
    group = shape.num_heads // shape.num_kv_heads
    # [L, nh, hd]
    k = k.to(q.dtype).repeat_interleave(group, dim=1)
    v = v.to(q.dtype).repeat_interleave(group, dim=1)
    num_queries, length = q.shape[0], k.shape[0]
    # [nh, Q, L]
    scores = torch.einsum("qhd,lhd->hql", q, k) * shape.scale
    # [Q, 1], [1, L]
    query_at = torch.arange(length - num_queries, length)[:, None]
    key_at = torch.arange(length)[None]
    visible = key_at <= query_at
    if shape.window is not None:
        visible &= key_at > query_at - shape.window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hql,lhd->qhd", weights, v)


def paged_attention(
    q: torch.Tensor, cache: LayerCache, inputs: StepInputs, shape: AttentionShape
) -> torch.Tensor:
    """Attention of the step's rows q [T, nh, hd] over the cache, their own K and V included."""
    out = torch.empty_like(widen(q))
    for s, length in enumerate(inputs.context_lens):
        rows = slice(inputs.query_start[s], inputs.query_start[s + 1])
        k, v = cache.read(inputs.block_tables[s], int(length))
        out[rows] = attend(q[rows], k, v, shape)
    return out
