"""The Triton side of `torch_ops.StepKernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels.triton.attention import PagedAttention
from quire.kernels.triton.plan import Tiling, make_plan
from quire.kernels.triton.rms_norm import rms_norm
from quire.kernels.triton.rope_cache import rope_and_cache

if TYPE_CHECKING:
    import torch

    from quire.kernels.ops import AttentionShape
    from quire.kernels.reference import LayerCache
    from quire.kernels.torch_ops import HeadRule, Step


class TritonKernels:
    """Norms, cache write and attention on a GPU. `tiling` overrides the choice by head size."""

    def __init__(self, tiling: Tiling | None = None) -> None:
        self._tiling = tiling

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """Normalise the last dimension in float32; result in `dtype`."""
        return rms_norm(x, weight, eps, dtype)

    def rope_and_cache(
        self, qkv: torch.Tensor, cache: LayerCache, step: Step, rule: HeadRule
    ) -> torch.Tensor:
        """Normalise and rotate q and k, write k and v to the cache: q [T, nh, hd]."""
        return rope_and_cache(qkv, cache, step, rule)

    def attention(
        self, q: torch.Tensor, cache: LayerCache, step: Step, shape: AttentionShape
    ) -> torch.Tensor:
        """Attention of q [T, nh, hd] over the cache: [T, nh, hd]."""
        attend = step.plans.get(shape)
        if not isinstance(attend, PagedAttention):
            tiling = self._tiling or Tiling.of(shape, q.element_size())
            plan = make_plan(step.inputs, shape, tiling, q.device)
            attend = PagedAttention(plan, shape, tiling)
            step.plans[shape] = attend
        return attend(q, cache, step)
