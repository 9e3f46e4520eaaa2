"""`python -m quire.kernels.triton.tune`: measure tiles on this GPU and write its table.

For the attention and integer matmuls of the model shapes below; commit the file it writes. Takes
some minutes, most of them compiling.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from quire.kernels.layout import BLOCK_SIZE, KvLayout
from quire.kernels.ops import AttentionShape, StepInputs
from quire.kernels.timing import seconds
from quire.kernels.torch_ops import TorchOps
from quire.kernels.triton.int_matmul import PackedInt, int_matmul
from quire.kernels.triton.kernels import TritonKernels
from quire.kernels.triton.plan import Tiling
from quire.kernels.triton.tuned import ROWS, MatmulTiling, attention_key, matmul_key, path_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

HEADS = [(32, 8, 128), (16, 8, 128), (32, 8, 64)]
"""Query heads, KV heads, head size: Llama 3.1 8B and Qwen3 8B, Qwen3 0.6B, Llama 3.2 1B."""
MATRICES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
"""[N, K] of Llama 3.1 8B: QKV, output, gate and up, down."""
CONTEXT = (8192, 32)
"""Tokens and sequences that attention is tuned on."""
GROUP = 128
T = TypeVar("T")
MakeAttention: TypeAlias = "Callable[[Tiling | None], Callable[[], object]]"


def attention_tilings() -> list[Tiling]:
    """What is tried for attention."""
    choices = product((32, 64, 128), (256, 512), (2, 4), (4, 8), (2, 3, 4))
    return [
        Tiling(keys=keys, split=split, programs=programs, warps=warps, stages=stages)
        for keys, split, programs, warps, stages in choices
    ]


def matmul_tilings(n: int, k: int) -> list[MatmulTiling]:
    """What is tried for an integer matmul of [N, K]."""
    choices = product((32, 64, 128), (1, 2, 4, 8, 16), (4, 8), (2, 3, 4))
    return [
        MatmulTiling(block_n, split, warps, stages)
        for block_n, split, warps, stages in choices
        if block_n <= n and split * GROUP <= k
    ]


def fastest(tilings: Iterable[T], timed: Callable[[T], float]) -> tuple[T, float]:
    """The tiling with the least time; those that do not fit the device are passed over."""
    best: tuple[T, float] | None = None
    for tiling in tilings:
        try:
            took = timed(tiling)
        except OutOfResources:
            continue
        if best is None or took < best[1]:
            best = (tiling, took)
    if best is None:
        raise ValueError("no tiling fits this device")
    return best


def decode_step(lengths: Sequence[int]) -> StepInputs:
    """The next row of sequences of these lengths, each with blocks of its own."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    starts = np.cumsum([0, *counts])
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    for row, (start, count) in enumerate(zip(starts, counts, strict=False)):
        tables[row, :count] = np.arange(start, start + count)
    context_lens = np.array(lengths, np.int32)
    query_start = np.arange(len(lengths) + 1, dtype=np.int32)
    rows = query_start[:-1]
    return StepInputs(rows, context_lens - 1, query_start, context_lens, tables, rows)


def attention_work(
    heads: tuple[int, int, int], lengths: Sequence[int], device: torch.device
) -> tuple[AttentionShape, MakeAttention]:
    """Attention of a decode step over one layer's cache: bf16, every block its own memory.

    Returns the shape, and what makes the work for a tiling (None for the table's).
    """
    num_heads, num_kv_heads, head_dim = heads
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, head_dim**-0.5)
    step = decode_step(lengths)
    num_blocks = int(step.block_tables.max()) + 1
    ops = TorchOps(KvLayout(1, num_kv_heads, head_dim, "bfloat16"), num_blocks, device, True)
    ops.pool.normal_()
    q = torch.randn(len(lengths), num_heads, head_dim, dtype=ops.dtype, device=device)

    def make(tiling: Tiling | None) -> Callable[[], object]:
        ops.kernels = TritonKernels(tiling)
        ops.begin(step)
        return lambda: ops.attention(q, 0, shape)

    return shape, make


def random_int4(n: int, k: int, device: torch.device) -> PackedInt:
    """An int4 weight of noise."""
    words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device=device)
    scales = torch.rand(n, k // GROUP, device=device).to(torch.bfloat16) / 100
    return PackedInt(words, scales, None, 4)


def tune(device: torch.device) -> dict[str, dict[str, Any]]:
    """The table of a device."""
    attention, matmul = {}, {}
    for heads in HEADS:
        shape, make = attention_work(heads, [CONTEXT[0]] * CONTEXT[1], device)

        def attend(t: Tiling, make: MakeAttention = make) -> float:
            return seconds(make(t), device)

        tiling, took = fastest(attention_tilings(), attend)
        key = attention_key(shape, 2)
        attention[key] = asdict(tiling)
        print(f"{key}: {1e6 * took:.1f} us, {tiling}", flush=True)
    for (n, k), rows in product(MATRICES, ROWS):
        weight = random_int4(n, k, device)
        x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)

        def timed(t: MatmulTiling, x: torch.Tensor = x, weight: PackedInt = weight) -> float:
            return seconds(lambda: int_matmul(x, weight, t), device)

        chosen, took = fastest(matmul_tilings(n, k), timed)
        key = matmul_key(4, (rows, n, k))
        matmul[key] = asdict(chosen)
        print(f"{key}: {1e6 * took:.1f} us, {chosen}", flush=True)
    return {"attention": attention, "matmul": matmul}


def main() -> int:
    """Tune this machine's GPU; returns the exit code."""
    if not torch.cuda.is_available():
        print("quire: error: tuning needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    path = path_of(torch.cuda.get_device_name(device))
    table = tune(device)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
