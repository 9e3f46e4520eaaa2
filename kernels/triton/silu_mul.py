"""The gate of the MLP: silu(gate) * up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # [rows, 2 n], contiguous: gate, then up
    out_ptr,  # [rows, n]
    n,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    gate = tl.load(gate_up_ptr + row * 2 * n + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * n + n + i, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * n + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [rows, 2 n] in float32, rounded once to its type: [rows, n]."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, n))
    if rows > 0:
        _silu_mul_kernel[(rows, triton.cdiv(n, BLOCK))](gate_up, out, n, BLOCK=BLOCK, num_warps=4)
    return out
