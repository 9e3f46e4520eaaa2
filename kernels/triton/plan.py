"""How one step's attention is divided into pieces of work for the GPU.

Two kinds of tile, each of consecutive rows of one sequence and the query heads of one KV head:

    whole  many rows (a chunk of a prompt): one program walks the tile's whole context
    split  the few rows of a decoding sequence: one program per SPLIT tokens of context, at absolute
           positions, each leaving a partial result; a second kernel combines them in order

So the longest context of a batch does not decide the grid: work is a flat list of items of about
equal size ("Stream-K" in spirit; split-KV after Flash-Decoding, Dao et al., 2023), the longest
first, dealt out to as many programs as the GPU runs at once. Which kind a sequence is and where its
splits lie follow from that sequence alone, so what shares the step does not change a result.

Two planners make the same lists: `make_plan` on the host, for any step, and `decode_plan` on the
GPU, for steps of one row per sequence, whose lengths a captured graph reads anew at every replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.kernels.staging import to_device

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape, StepInputs

MAX_SPLITS = 128
"""Of one context: bounds the memory of partial results. Longer contexts get longer splits."""
INTERPRETED_PROGRAMS = 8
"""Programs that share a list of splits where there is no GPU to fill."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of the kernels' tiles. Powers of two, 16 at least."""

    whole_rows: int = 64
    """(token, head) rows of a whole tile; a split tile has 16."""
    keys: int = 64
    """Tokens of context per turn of the loop."""
    split: int = 256
    """Tokens of context per item of a split tile, at least; a multiple of `keys`."""
    programs: int = 4
    """Programs per multiprocessor that share the list of splits."""
    warps: int = 4
    stages: int = 2
    """Turns of the loop whose loads are in flight."""

    @classmethod
    def of(cls, shape: AttentionShape, element_bytes: int) -> Tiling:
        """What fits a multiprocessor's shared memory and registers."""
        is_large = shape.head_dim > 128 or element_bytes == 4
        return cls(whole_rows=32 if is_large else 64, keys=32 if is_large else 64)


@dataclass(frozen=True)
class Tile:
    """Rows of a tile for one head group."""

    rows: int  # a power of two
    tokens: int  # whole tokens that fit: rows // group


@dataclass(frozen=True)
class WorkList:
    """Items of one kind on the device."""

    items: torch.Tensor
    """[capacity, 6] int32: sequence, first row, tokens, position of the first, context's begin and
    end."""
    count: torch.Tensor
    """[1] int32: how many of them there are."""
    tile: Tile


@dataclass(frozen=True)
class StepPlan:
    """The attention work of one step for one attention shape."""

    whole: WorkList
    split: WorkList
    merges: torch.Tensor
    """[rows, 4] int32, for each row of a split tile: row of the step, first item, number of items,
    token within the tile."""
    max_split_tokens: int
    """Most tokens that any split tile has."""


def _tile(shape: AttentionShape, rows: int) -> Tile:
    group = shape.num_heads // shape.num_kv_heads
    while rows < group:
        rows *= 2
    return Tile(rows, rows // group)


def split_tile(shape: AttentionShape) -> Tile:
    """The tile of decoding rows."""
    return _tile(shape, 16)


def num_programs(tiling: Tiling, device: torch.device) -> int:
    """Programs that share a list of splits."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * tiling.programs


def split_len(context: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Tokens per item for contexts of these lengths: a multiple of `tiling.keys`."""
    least = -(-context // (MAX_SPLITS * tiling.keys)) * tiling.keys
    return np.asarray(np.maximum(least, tiling.split))


@dataclass(frozen=True)
class _Sequences:
    """Some of the step's sequences: int64 arrays of equal length."""

    index: np.ndarray
    row: np.ndarray  # first row of the step
    tokens: np.ndarray  # rows of the step
    position: np.ndarray  # of the first row

    def chosen(self, which: np.ndarray) -> _Sequences:
        return _Sequences(
            self.index[which], self.row[which], self.tokens[which], self.position[which]
        )


def _counting(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after the other."""
    ends = np.cumsum(counts)
    starts = np.repeat(ends - counts, counts)
    return np.asarray(np.arange(len(starts)) - starts)


def _context_begin(position: np.ndarray, window: int | None, keys: int) -> np.ndarray:
    """First token that the row at `position` sees, rounded down to a turn of the loop."""
    first = position * 0 if window is None else np.maximum(position - window + 1, 0)
    return np.asarray(first // keys * keys)


def _whole_items(seqs: _Sequences, tile: Tile, window: int | None, tiling: Tiling) -> np.ndarray:
    """Items [I, 6], the longest contexts first, so that short ones fill in at the end."""
    counts = -(-seqs.tokens // tile.tokens)
    done = _counting(counts) * tile.tokens
    tokens = np.minimum(np.repeat(seqs.tokens, counts) - done, tile.tokens)
    position = np.repeat(seqs.position, counts) + done
    begin = _context_begin(position, window, tiling.keys)
    end = position + tokens
    row = np.repeat(seqs.row, counts) + done
    items = np.stack([np.repeat(seqs.index, counts), row, tokens, position, begin, end], axis=1)
    return items[np.argsort(begin - end, kind="stable")]


def _split_items(
    seqs: _Sequences, window: int | None, tiling: Tiling
) -> tuple[np.ndarray, np.ndarray]:
    """Items [I, 6], the longest sequence's first, and the merges [rows, 4]."""
    seqs = seqs.chosen(np.argsort(-(seqs.position + seqs.tokens), kind="stable"))
    begin = _context_begin(seqs.position, window, tiling.keys)
    end = seqs.position + seqs.tokens
    size = split_len(end, tiling)
    first = begin // size
    counts = -(-end // size) - first
    split, each = np.repeat(first, counts) + _counting(counts), np.repeat(size, counts)
    items = np.stack(
        [
            *(np.repeat(x, counts) for x in (seqs.index, seqs.row, seqs.tokens, seqs.position)),
            np.maximum(split * each, np.repeat(begin, counts)),
            np.minimum((split + 1) * each, np.repeat(end, counts)),
        ],
        axis=1,
    )
    token = _counting(seqs.tokens)
    first_item = np.cumsum(counts) - counts
    merges = np.stack(
        [
            np.repeat(seqs.row, seqs.tokens) + token,
            np.repeat(first_item, seqs.tokens),
            np.repeat(counts, seqs.tokens),
            token,
        ],
        axis=1,
    )
    return items, merges


def make_plan(
    inputs: StepInputs, shape: AttentionShape, tiling: Tiling, device: torch.device
) -> StepPlan:
    """Divide the step's attention; the lists go to the device in one transfer."""
    row = inputs.query_start[:-1].astype(np.int64)
    tokens = np.diff(inputs.query_start).astype(np.int64)
    seqs = _Sequences(np.arange(len(row)), row, tokens, inputs.context_lens - tokens)
    whole_tile, few_rows = _tile(shape, tiling.whole_rows), split_tile(shape)
    is_split = tokens <= few_rows.tokens
    whole = _whole_items(seqs.chosen(~is_split), whole_tile, shape.window, tiling)
    split, merges = _split_items(seqs.chosen(is_split), shape.window, tiling)

    counts = np.array([len(whole), len(split)])
    parts = [counts, whole.ravel(), split.ravel(), merges.ravel()]
    on_device = to_device(np.concatenate(parts).astype(np.int32), device)
    count, whole_part, split_part, merge_part = torch.split(on_device, [p.size for p in parts])
    return StepPlan(
        WorkList(whole_part.view(-1, 6), count[:1], whole_tile),
        WorkList(split_part.view(-1, 6), count[1:], few_rows),
        merge_part.view(-1, 4),
        int(tokens[is_split].max(initial=0)),
    )
