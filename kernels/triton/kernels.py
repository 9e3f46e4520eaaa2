"""The Triton side of `torch_ops.StepKernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels import torch_sampler
from quire.kernels.layout import BLOCK_SIZE
from quire.kernels.triton.attention import PagedAttention
from quire.kernels.triton.decode_plan import decode_plan
from quire.kernels.triton.plan import make_plan
from quire.kernels.triton.rms_norm import add_rms_norm
from quire.kernels.triton.rope_cache import rope_and_cache
from quire.kernels.triton.sample import draw, is_plain
from quire.kernels.triton.silu_mul import silu_mul
from quire.kernels.triton.tuned import attention_tiling

if TYPE_CHECKING:
    import torch

    from quire.kernels.ops import AttentionShape
    from quire.kernels.reference import LayerCache
    from quire.kernels.sampling import SamplingBatch
    from quire.kernels.torch_ops import HeadRule, Residual, Step
    from quire.kernels.triton.plan import Tiling


class TritonKernels:
    """The step's fused operations on a GPU. `tiling` overrides the choice by head size."""

    def __init__(self, tiling: Tiling | None = None) -> None:
        self._tiling = tiling

    def rms_norm(
        self, x: Residual, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """Settle x, and normalise it in float32; result [rows, H] in `dtype`."""
        product, x.product = x.product, None
        return add_rms_norm(x.stream, product, weight, eps, dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [rows, 2 I], gate first: [rows, I]."""
        return silu_mul(gate_up)

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
            tiling = self._tiling or attention_tiling(shape, q.element_size(), q.device)
            if step.inputs is None:
                max_context = step.block_tables.shape[1] * BLOCK_SIZE
                plan = decode_plan(step.positions, max_context, shape, tiling)
            else:
                plan = make_plan(step.inputs, shape, tiling, q.device)
            attend = PagedAttention(plan, shape, tiling)
            step.plans[shape] = attend
        return attend(q, cache, step)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Draw tokens of logits [R, V]: int32 [2, N], token and whether there was none to draw."""
        if is_plain(batch):
            return draw(logits, batch)
        return torch_sampler.draw(logits, batch)
