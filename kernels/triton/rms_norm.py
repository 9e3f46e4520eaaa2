"""RMS normalisation of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, n], contiguous
    weight_ptr,  # [n]
    out_ptr,  # [rows, n]
    n,
    eps,
    BLOCK: tl.constexpr,  # n rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + row * n + i, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps) * weight
    tl.store(out_ptr + row * n + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x [rows, n] / rms(x) * weight in float32, rounded once to `dtype`: [rows, n]."""
    rows, n = x.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    if rows > 0:
        block = triton.next_power_of_2(n)
        num_warps = min(16, max(1, block // 512))
        _rms_norm_kernel[(rows,)](
            x.contiguous(), weight, out, n, eps, BLOCK=block, num_warps=num_warps
        )
    return out
