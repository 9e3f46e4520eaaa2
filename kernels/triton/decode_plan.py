"""The division of a decode step's attention, made on the GPU from the step's positions.

The same lists as `plan.make_plan` makes on the host, in buffers of fixed size: one small kernel per
step and attention shape, which a captured graph runs again over new positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quire.kernels.triton.plan import MAX_SPLITS, StepPlan, Tile, WorkList, split_tile

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape
    from quire.kernels.triton.plan import Tiling

NO_TILE = Tile(0, 0)


@triton.jit
def _bounds(end, WINDOW: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, MAX: tl.constexpr):
    """First token seen, tokens per item, and number of items of contexts that end at `end`."""
    begin = tl.maximum(end - WINDOW, 0) // KEYS * KEYS if WINDOW > 0 else end * 0
    size = tl.maximum((end + MAX * KEYS - 1) // (MAX * KEYS) * KEYS, SPLIT)
    return begin, size, (end + size - 1) // size - begin // size


@triton.jit
def _decode_plan_kernel(
    positions_ptr,  # [rows]
    items_ptr,  # [capacity, 6], see WorkList
    count_ptr,  # [1]
    merges_ptr,  # [rows, 4], see StepPlan
    rows,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_MAX: tl.constexpr,  # powers of two
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0)
    other = tl.arange(0, BLOCK_ROWS)
    is_row = other < rows
    end = tl.load(positions_ptr + row) + 1
    begin, size, count = _bounds(end, WINDOW, KEYS, SPLIT, MAX)
    ends = tl.load(positions_ptr + other, mask=is_row, other=0) + 1
    _, _, counts = _bounds(ends, WINDOW, KEYS, SPLIT, MAX)
    # longest first, equal ones in the order of rows
    is_before = is_row & ((ends > end) | ((ends == end) & (other < row)))
    first = tl.sum(tl.where(is_before, counts, 0), 0)

    i = tl.arange(0, BLOCK_MAX)
    is_item = i < count
    split = begin // size + i
    item_ptr = items_ptr + (first + i) * 6
    tl.store(item_ptr, row + i * 0, mask=is_item)
    tl.store(item_ptr + 1, row + i * 0, mask=is_item)
    tl.store(item_ptr + 2, 1 + i * 0, mask=is_item)
    tl.store(item_ptr + 3, end - 1 + i * 0, mask=is_item)
    tl.store(item_ptr + 4, tl.maximum(split * size, begin), mask=is_item)
    tl.store(item_ptr + 5, tl.minimum((split + 1) * size, end), mask=is_item)
    tl.store(merges_ptr + row * 4, row)
    tl.store(merges_ptr + row * 4 + 1, first)
    tl.store(merges_ptr + row * 4 + 2, count)
    tl.store(merges_ptr + row * 4 + 3, 0)
    if row == 0:
        tl.store(count_ptr, tl.sum(tl.where(is_row, counts, 0), 0))


def decode_plan(
    positions: torch.Tensor, max_context: int, shape: AttentionShape, tiling: Tiling
) -> StepPlan:
    """The plan of a step whose rows are one each of sequences, at `positions` [rows] int32.

    `max_context` bounds the contexts that the plan's buffers have room for, in tokens.
    """
    rows, device = len(positions), positions.device
    most = min(MAX_SPLITS, -(-max_context // tiling.split)) + 1
    items = torch.empty((rows * most, 6), dtype=torch.int32, device=device)
    merges = torch.empty((rows, 4), dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    _decode_plan_kernel[(rows,)](
        positions,
        items,
        counts[1:],
        merges,
        rows,
        WINDOW=shape.window or 0,
        KEYS=tiling.keys,
        SPLIT=tiling.split,
        MAX=MAX_SPLITS,
        BLOCK_MAX=triton.next_power_of_2(most),
        BLOCK_ROWS=triton.next_power_of_2(rows),
    )
    return StepPlan(
        WorkList(items[:0], counts[:1], NO_TILE),
        WorkList(items, counts[1:], split_tile(shape)),
        merges,
        1,
    )
