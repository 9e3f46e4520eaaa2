"""The operations that have a hand-written form on some device, in vectorised torch for any.

The truth is `reference`; this is what a machine without a compiler and without a GPU computes with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from quire.kernels import torch_sampler
from quire.kernels.layout import BLOCK_SIZE
from quire.kernels.reference import norm_and_rotate

if TYPE_CHECKING:
    from quire.kernels.ops import AttentionShape
    from quire.kernels.reference import LayerCache
    from quire.kernels.sampling import SamplingBatch
    from quire.kernels.torch_ops import HeadRule, Residual, Step


class TorchKernels:
    """The fallback: vectorised torch, one sequence at a time in attention."""

    def rms_norm(
        self, x: Residual, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """Settle x, and normalise it in float32; result [rows, H] in `dtype`."""
        stream = x.settle()
        return F.rms_norm(stream, stream.shape[-1:], weight.float(), eps).to(dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [rows, 2 I], gate first: [rows, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rope_and_cache(
        self, qkv: torch.Tensor, cache: LayerCache, step: Step, rule: HeadRule
    ) -> torch.Tensor:
        """Normalise and rotate q and k, write k and v to the cache: q [T, nh, hd]."""
        q, k, v = norm_and_rotate(qkv, step.positions, rule.shape, rule.rope, rule.norms)
        # [num_blocks, nkv, 2, 16, hd], a view of the pool
        tiles = cache.pool[:, :, cache.layer].view(
            cache.pool.shape[0], -1, 2, cache.layout.block_size, cache.layout.head_dim
        )
        block, slot = step.block.long(), step.slot.long()
        tiles[block, :, 0, slot] = k.to(tiles.dtype)
        tiles[block, :, 1, slot] = v.to(tiles.dtype)
        return q.to(qkv.dtype)

    def attention(
        self, q: torch.Tensor, cache: LayerCache, step: Step, shape: AttentionShape
    ) -> torch.Tensor:
        """Attention of q [T, nh, hd] over the cache by torch's fused kernel: [T, nh, hd]."""
        out = torch.empty_like(q)
        inputs = step.host
        for s, length in enumerate(inputs.context_lens.tolist()):
            rows = slice(int(inputs.query_start[s]), int(inputs.query_start[s + 1]))
            queries = range(length - (rows.stop - rows.start), length)
            first_key = 0 if shape.window is None else max(0, queries.start - shape.window + 1)
            first_block = first_key // BLOCK_SIZE
            blocks = step.block_tables[s, first_block : -(-length // BLOCK_SIZE)].long()
            # [blocks, nkv, 2, tile] -> [2, nkv, keys, hd]
            kv = cache.pool[blocks, :, cache.layer]
            kv = kv.view(len(blocks), -1, 2, BLOCK_SIZE, shape.head_dim).permute(2, 1, 0, 3, 4)
            kv = kv.flatten(2, 3)[:, :, : length - first_block * BLOCK_SIZE]
            # q [1, nh, Q, hd]
            out[rows] = F.scaled_dot_product_attention(
                q[None, rows].transpose(1, 2),
                kv[None, 0],
                kv[None, 1],
                attn_mask=_visible(queries, first_block * BLOCK_SIZE, shape.window, q.device),
                scale=shape.scale,
                enable_gqa=shape.num_heads != shape.num_kv_heads,
            )[0].transpose(0, 1)
        return out

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Draw tokens of logits [R, V]: int32 [2, N], token and whether there was none to draw."""
        return torch_sampler.draw(logits, batch)


def _visible(
    queries: range, first_key: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which of the keys [first_key, queries.stop) each query sees: bool [Q, keys], None for all."""
    if len(queries) == 1 and (window is None or queries.start - first_key < window):
        return None
    # [Q, 1], [1, keys]
    query_at = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key_at = torch.arange(first_key, queries.stop, device=device)[None]
    visible = key_at <= query_at
    return visible if window is None else visible & (key_at > query_at - window)
