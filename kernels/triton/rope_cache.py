"""Head norm, rotary embedding and cache write in one pass over the fused QKV rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from quire.kernels.reference import LayerCache
    from quire.kernels.torch_ops import HeadRule, Step

HEADS_PER_PROGRAM = 8


@triton.jit
def _rope_cache_kernel(
    qkv_ptr,  # [T, (NH + 2 NKV) HEAD_DIM]
    q_out_ptr,  # [T, NH, HEAD_DIM]: not in place, as a program reads a head twice
    pool_ptr,  # the layer's K tiles: [num_blocks, NKV, ..., 2, 16, HEAD_DIM] from the first
    positions_ptr,  # [T]
    block_ptr,  # [T] block of the pool that a row is written to
    slot_ptr,  # [T] slot in that block
    cos_ptr,  # [positions, ROTARY / 2]
    sin_ptr,
    q_norm_ptr,  # [HEAD_DIM], unused without HAS_NORM
    k_norm_ptr,
    eps,
    stride_row,  # of qkv
    stride_block,  # of the pool, in elements
    stride_head,
    stride_v,  # from a K tile to its V tile
    NH: tl.constexpr,
    NKV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    half: tl.constexpr = ROTARY // 2
    # the dimension that each one is rotated with; itself behind the rotated part
    partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))

    # [BLOCK_H, BLOCK_D]
    is_head = (head < NH + 2 * NKV)[:, None]
    mask = is_head & (d < HEAD_DIM)[None, :]
    base = qkv_ptr + row * stride_row + head[:, None] * HEAD_DIM
    raw = tl.load(base + d[None, :], mask=mask, other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        in_head = d < HEAD_DIM
        wq = tl.load(q_norm_ptr + d, mask=in_head, other=0.0).to(tl.float32)[None, :]
        wk = tl.load(k_norm_ptr + d, mask=in_head, other=0.0).to(tl.float32)[None, :]
        wq_y = tl.load(q_norm_ptr + partner, mask=in_head, other=0.0).to(tl.float32)[None, :]
        wk_y = tl.load(k_norm_ptr + partner, mask=in_head, other=0.0).to(tl.float32)[None, :]
        is_q = (head < NH)[:, None]
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = x * rstd * tl.where(is_q, wq, wk)
        y = y * rstd * tl.where(is_q, wq_y, wk_y)

    position = tl.load(positions_ptr + row).to(tl.int64)
    angle = position * half + tl.where(d < half, d, d - half)
    rotated = d < ROTARY
    cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)[None, :]
    x = x * cos + y * tl.where(d < half, -1.0, 1.0)[None, :] * sin
    is_v = (head >= NH + NKV)[:, None]
    result = tl.where(is_v, raw, x.to(raw.dtype))

    q_at = q_out_ptr + (row * NH + head[:, None]) * HEAD_DIM + d[None, :]
    tl.store(q_at, result, mask=mask & (head < NH)[:, None])
    kv_head = tl.where(head >= NH + NKV, head - NH - NKV, head - NH)
    tile = tl.load(block_ptr + row).to(tl.int64) * stride_block + kv_head * stride_head
    tile += tl.where(head >= NH + NKV, stride_v, 0)
    cache_at = pool_ptr + tile[:, None] + tl.load(slot_ptr + row) * HEAD_DIM + d[None, :]
    stored = result.to(pool_ptr.dtype.element_ty)
    tl.store(cache_at, stored, mask=mask & (head >= NH)[:, None])


def rope_and_cache(
    qkv: torch.Tensor, cache: LayerCache, step: Step, rule: HeadRule
) -> torch.Tensor:
    """Normalise and rotate q and k of qkv [T, (nh + 2 nkv) hd], write k and v: q [T, nh, hd].

    Arithmetic in float32, one rounding. Rows go to `step.block` and `step.slot` of the layer.
    """
    shape, rows = rule.shape, qkv.shape[0]
    q = torch.empty((rows, shape.num_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return q
    q_norm, k_norm, eps = rule.norms if rule.norms is not None else (q, q, 0.0)
    # [num_blocks, nkv, 2, tile]
    tiles = cache.pool[:, :, cache.layer]
    heads = shape.num_heads + 2 * shape.num_kv_heads
    _rope_cache_kernel[(rows, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        qkv,
        q,
        tiles,
        step.positions,
        step.block,
        step.slot,
        rule.rope.cos,
        rule.rope.sin,
        q_norm,
        k_norm,
        eps,
        qkv.stride(0),
        tiles.stride(0),
        tiles.stride(1),
        tiles.stride(2),
        NH=shape.num_heads,
        NKV=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim,
        ROTARY=rule.rope.rotary_dim,
        HAS_NORM=rule.norms is not None,
        BLOCK_H=HEADS_PER_PROGRAM,
        BLOCK_D=triton.next_power_of_2(shape.head_dim),
    )
    return q
