"""RMS normalisation of the residual stream, which takes in the last product on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, n], contiguous; written with HAS_PRODUCT
    product_ptr,  # [rows, n], contiguous; unused without HAS_PRODUCT
    weight_ptr,  # [n]
    out_ptr,  # [rows, n]
    n,
    eps,
    HAS_PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,  # n rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + row * n + i, mask=mask, other=0.0).to(tl.float32)
    if HAS_PRODUCT:
        x += tl.load(product_ptr + row * n + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * n + i, x, mask=mask)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps) * weight
    tl.store(out_ptr + row * n + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor,
    product: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add `product` [rows, n], if any, to the float32 stream x [rows, n] in place; then x / rms(x)
    * weight in float32, rounded once to `dtype`: [rows, n]."""
    rows, n = x.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    if rows > 0:
        block = triton.next_power_of_2(n)
        _rms_norm_kernel[(rows,)](
            x,
            x if product is None else product,
            weight,
            out,
            n,
            eps,
            HAS_PRODUCT=product is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out
