"""Paged attention: one kernel for prompts and decoding, and the merge of split contexts.

FlashAttention-2's loop (Dao, 2023) over blocks of a paged cache (Kwon et al., 2023), with the query
heads of one KV head packed into the rows of a tile. See `plan` for how work is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quire.kernels.layout import BLOCK_SIZE
from quire.kernels.triton.plan import num_programs

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape
    from quire.kernels.reference import LayerCache
    from quire.kernels.torch_ops import Step
    from quire.kernels.triton.plan import StepPlan, Tiling, WorkList

LOG2_E = 1.4426950408889634
MERGE_TURN = 16
"""Partial results that the merge reads at a time."""


@triton.jit
def _attention_kernel(
    q_ptr,  # [T, NH, HEAD_DIM]
    out_ptr,  # [T, NH, HEAD_DIM]; unused with IS_SPLIT
    partial_ptr,  # [items, NKV, partial_rows, HEAD_DIM] float32; used with IS_SPLIT
    stats_ptr,  # [items, NKV, partial_rows, 2] float32: largest score (base 2), sum of weights
    pool_ptr,  # the layer's K tiles: [num_blocks, NKV, ..., 2, 16, HEAD_DIM] from the first
    tables_ptr,  # [S, B] block of each 16 tokens
    items_ptr,  # [items, 6], see WorkList
    count_ptr,  # [1] items in the list
    scale,  # of scores, times log2(e)
    partial_rows,
    stride_block,  # of the pool, in elements
    stride_head,
    stride_v,  # from a K tile to its V tile
    stride_table,
    WINDOW: tl.constexpr,  # 0 for none
    NH: tl.constexpr,
    NKV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,  # tokens of a block of the pool
    TILE_TOKENS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,  # type of the factors of products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    GROUP: tl.constexpr = NH // NKV
    # row m of the tile: head m % GROUP of the group, token m // GROUP of the tile
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = m // GROUP
    in_head = d < HEAD_DIM
    # the list's length is read here, so that a captured grid fits every replay
    units = tl.load(count_ptr) * NKV
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        item = tl.cast(unit // NKV, tl.int64)
        kv_head = tl.cast(unit % NKV, tl.int64)
        sequence = tl.load(items_ptr + item * 6).to(tl.int64)
        first_row = tl.load(items_ptr + item * 6 + 1).to(tl.int64)
        tokens = tl.load(items_ptr + item * 6 + 2)
        first_position = tl.load(items_ptr + item * 6 + 3)
        begin = tl.load(items_ptr + item * 6 + 4)
        end = tl.load(items_ptr + item * 6 + 5)

        is_row = (token < tokens) & (token < TILE_TOKENS)
        row_head = (first_row + token) * NH + kv_head * GROUP + m % GROUP
        q_mask = is_row[:, None] & in_head[None, :]
        # [BLOCK_M, BLOCK_D]
        q_at = row_head[:, None] * HEAD_DIM + d[None, :]
        q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0).to(OPERAND)
        position = first_position + token

        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        table_ptr = tables_ptr + sequence * stride_table
        head_ptr = pool_ptr + kv_head * stride_head
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            # only what the sequence has written is read: 0 * NaN would spoil a sum
            is_key = key < end
            block = tl.load(table_ptr + key // PAGE, mask=is_key, other=0).to(tl.int64)
            key_at = block * stride_block + (key % PAGE) * HEAD_DIM
            k_at = head_ptr + key_at[None, :] + d[:, None]
            k = tl.load(k_at, mask=is_key[None, :] & in_head[:, None], other=0.0)
            k = k.to(OPERAND)
            # [BLOCK_M, BLOCK_N]
            score = tl.dot(q, k, input_precision="ieee") * scale
            visible = (key[None, :] <= position[:, None]) & is_key[None, :]
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))

            new_largest = tl.maximum(largest, tl.max(score, 1))
            # a row that has seen nothing yet: -inf - -inf would be NaN
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight = tl.exp2(score - shift[:, None])
            decay = tl.exp2(largest - shift)
            largest = new_largest
            total = total * decay + tl.sum(weight, 1)
            v_at = head_ptr + stride_v + key_at[:, None] + d[None, :]
            v = tl.load(v_at, mask=is_key[:, None] & in_head[None, :], other=0.0)
            weight = weight.to(v.dtype).to(OPERAND)
            product = tl.dot(weight, v.to(OPERAND), input_precision="ieee")
            acc = acc * decay[:, None] + product

        if IS_SPLIT:
            partial_row = (item * NKV + kv_head) * partial_rows + m
            partial_at = partial_row[:, None] * HEAD_DIM + d[None, :]
            tl.store(partial_ptr + partial_at, acc, mask=q_mask)
            tl.store(stats_ptr + partial_row * 2, largest, mask=is_row)
            tl.store(stats_ptr + partial_row * 2 + 1, total, mask=is_row)
        else:
            # rows of the tile that are nobody's have seen nothing: keep them from dividing by zero
            result = acc / tl.where(is_row, total, 1.0)[:, None]
            tl.store(out_ptr + q_at, result.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _merge_kernel(
    partial_ptr,  # [items, NKV, partial_rows, HEAD_DIM]
    stats_ptr,  # [items, NKV, partial_rows, 2]
    merges_ptr,  # [rows, 4], see StepPlan
    out_ptr,  # [T, NH, HEAD_DIM]
    partial_rows,
    NH: tl.constexpr,
    NKV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(merges_ptr + index * 4).to(tl.int64)
    first = tl.load(merges_ptr + index * 4 + 1).to(tl.int64)
    count = tl.load(merges_ptr + index * 4 + 2)
    token = tl.load(merges_ptr + index * 4 + 3)

    GROUP: tl.constexpr = NH // NKV
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    tile_row = token * GROUP + head % GROUP
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, TURN):
        i = start + tl.arange(0, TURN)
        is_item = i < count
        partial_row = ((first + i) * NKV + head // GROUP) * partial_rows + tile_row
        # [TURN]; a split that a row sees nothing of (window) has largest -inf and total 0
        high = tl.load(stats_ptr + partial_row * 2, mask=is_item, other=float("-inf"))
        mass = tl.load(stats_ptr + partial_row * 2 + 1, mask=is_item, other=0.0)
        new_largest = tl.maximum(largest, tl.max(high, 0))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight = tl.exp2(high - shift)
        decay = tl.exp2(largest - shift)
        largest = new_largest
        total = total * decay + tl.sum(mass * weight, 0)
        # [TURN, BLOCK_D]
        part_at = partial_row[:, None] * HEAD_DIM + d[None, :]
        part_mask = is_item[:, None] & in_head[None, :]
        part = tl.load(partial_ptr + part_at, mask=part_mask, other=0.0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * NH + head) * HEAD_DIM + d, out, mask=in_head)


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """In which type a kernel multiplies values of `dtype`."""
    # the interpreter keeps bf16 as integers and multiplies those; float32 holds them exactly
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Rows:
    """Queries and results [T, nh, hd] of a step, and the cache they read."""

    q: torch.Tensor
    out: torch.Tensor
    cache: LayerCache
    tables: torch.Tensor  # [S, B]


class PagedAttention:
    """Attention of one step's rows over one layer's cache, by a plan made for the step."""

    def __init__(self, plan: StepPlan, shape: AttentionShape, tiling: Tiling) -> None:
        self.plan = plan
        self.shape = shape
        self.tiling = tiling

    def __call__(self, q: torch.Tensor, cache: LayerCache, step: Step) -> torch.Tensor:
        """Attention of q [T, nh, hd]: [T, nh, hd]."""
        rows = _Rows(q, torch.empty_like(q), cache, step.block_tables)
        if self.plan.whole.items.shape[0] > 0:
            nothing = q.new_empty((1, 1, 1, 1), dtype=torch.float32)
            self._walk(self.plan.whole, rows, nothing, nothing)
        if self.plan.split.items.shape[0] > 0:
            self._split(rows)
        return rows.out

    def _split(self, rows: _Rows) -> None:
        """Partial results of every split, then their merge."""
        shape, plan = self.shape, self.plan
        partial_rows = plan.max_split_tokens * (shape.num_heads // shape.num_kv_heads)
        lead = (plan.split.items.shape[0], shape.num_kv_heads, partial_rows)
        partial = rows.q.new_empty((*lead, shape.head_dim), dtype=torch.float32)
        stats = rows.q.new_empty((*lead, 2), dtype=torch.float32)
        self._walk(plan.split, rows, partial, stats)
        _merge_kernel[(plan.merges.shape[0], shape.num_heads)](
            partial,
            stats,
            plan.merges,
            rows.out,
            partial_rows,
            NH=shape.num_heads,
            NKV=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            TURN=MERGE_TURN,
            BLOCK_D=triton.next_power_of_2(shape.head_dim),
            num_warps=4,
        )

    def _walk(
        self, work: WorkList, rows: _Rows, partial: torch.Tensor, stats: torch.Tensor
    ) -> None:
        """Run every item of the list; `partial` and `stats` are written for split tiles only."""
        shape = self.shape
        # [num_blocks, nkv, 2, tile]
        tiles = rows.cache.pool[:, :, rows.cache.layer]
        units = work.items.shape[0] * shape.num_kv_heads
        if work is self.plan.split:
            units = min(units, num_programs(self.tiling, rows.q.device))
        _attention_kernel[(units,)](
            rows.q,
            rows.out,
            partial,
            stats,
            tiles,
            rows.tables,
            work.items,
            work.count,
            shape.scale * LOG2_E,
            partial.shape[2],
            tiles.stride(0),
            tiles.stride(1),
            tiles.stride(2),
            rows.tables.stride(0),
            WINDOW=shape.window or 0,
            NH=shape.num_heads,
            NKV=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            PAGE=BLOCK_SIZE,
            TILE_TOKENS=work.tile.tokens,
            IS_SPLIT=work is self.plan.split,
            OPERAND=operand_type(rows.q.dtype),
            BLOCK_M=work.tile.rows,
            BLOCK_N=self.tiling.keys,
            BLOCK_D=max(16, triton.next_power_of_2(shape.head_dim)),
            num_warps=self.tiling.warps,
            num_stages=self.tiling.stages,
        )
