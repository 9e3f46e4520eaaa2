"""Which sizes of tiles are fastest: by device and shape, measured, kept in `tuned/*.json`.

One file per device name, written by `python -m quire.kernels.triton.tune`. A shape that is not in
the table, or a device without one, gets the defaults below. The choice of `split` and `keys` is
also one of the order of sums, so two devices with different tables round differently.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.kernels.triton.plan import Tiling

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape

FOLDER = Path(__file__).parent / "tuned"
ROWS = (1, 4, 16, 64)
"""Batch sizes that matmuls are tuned for; others take the next larger one."""
PROGRAMS = 2
"""Programs per multiprocessor that a matmul of unknown shape is split into, at least."""
MAX_SPLIT = 16


@dataclass(frozen=True)
class MatmulTiling:
    """Sizes of the integer matmul."""

    block_n: int = 64
    """Columns per program."""
    split: int = 1
    """Programs that share K."""
    warps: int = 4
    stages: int = 3
    """Turns of the loop whose loads are in flight."""


def path_of(device_name: str) -> Path:
    """The table of a device."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def attention_key(shape: AttentionShape, element_bytes: int) -> str:
    """Name of an attention shape in a table."""
    group = shape.num_heads // shape.num_kv_heads
    return f"head_dim={shape.head_dim} group={group} bytes={element_bytes}"


def matmul_key(bits: int, sizes: tuple[int, int, int]) -> str:
    """Name of an integer matmul of sizes (m, n, k) in a table."""
    m, n, k = sizes
    rows = next(r for r in ROWS if r >= m)
    return f"bits={bits} n={n} k={k} rows={rows}"


@cache
def table(device: torch.device) -> dict[str, dict[str, Any]]:
    """What is known of a device: sections "attention" and "matmul" by key."""
    nothing: dict[str, dict[str, Any]] = {"attention": {}, "matmul": {}}
    if device.type != "cuda":
        return nothing
    path = path_of(torch.cuda.get_device_name(device))
    return nothing | json.loads(path.read_text(encoding="utf-8")) if path.exists() else nothing


def attention_tiling(shape: AttentionShape, element_bytes: int, device: torch.device) -> Tiling:
    """Tiles of paged attention."""
    found = table(device)["attention"].get(attention_key(shape, element_bytes))
    return Tiling.of(shape, element_bytes) if found is None else Tiling(**found)


def matmul_tiling(device: torch.device, bits: int, sizes: tuple[int, int, int]) -> MatmulTiling:
    """Tiles of an integer matmul of sizes (m, n, k)."""
    found = table(device)["matmul"].get(matmul_key(bits, sizes))
    if found is not None:
        return MatmulTiling(**found)
    _, n, k = sizes
    default = MatmulTiling()
    blocks, turns = -(-n // default.block_n), k * bits // 512
    wanted = -(-PROGRAMS * multiprocessors(device) // blocks)
    return MatmulTiling(split=max(1, min(wanted, turns, MAX_SPLIT)))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
