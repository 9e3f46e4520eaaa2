"""The reference operations against torch's and transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from quire.kernels import reference
from quire.kernels.layout import KvLayout, KvOrder
from quire.kernels.ops import Rope


def test_rms_norm_is_that_of_llama() -> None:
    norm = LlamaRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 48)
    torch.testing.assert_close(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_gate_up_silu_is_the_first_half_of_llamas_mlp() -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))
    x = torch.randn(3, 16)
    hidden = reference.gate_up_silu(x, mlp.gate_proj.weight, mlp.up_proj.weight)
    torch.testing.assert_close(reference.linear(hidden, mlp.down_proj.weight), mlp(x))


def test_linear_adds_its_bias() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(reference.linear(x, weight, bias), F.linear(x, weight, bias))


def test_rotation_is_that_of_llama() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    positions = torch.tensor([0, 3, 77, 1000])
    q, k = torch.randn(4, 4, 16), torch.randn(4, 2, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    # [1, heads, T, hd]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)

    rope = Rope(cos[0, :, :8], sin[0, :, :8])
    rows = torch.arange(4)
    for x, want in zip((q, k), expected, strict=True):
        got = reference.rotate(x, rows, rope)
        torch.testing.assert_close(got, want[0].transpose(0, 1))


def test_partial_rotation_leaves_the_rest_of_a_head_alone(make_rope) -> None:
    x = torch.randn(6, 2, 20)
    positions = torch.arange(6)
    rope = make_rope(8)
    turned = reference.rotate(x, positions, rope)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8], reference.rotate(x[..., :8], positions, rope))


def test_norms_come_before_the_rotation_and_spare_v(make_rope, attention_shape) -> None:
    shape = attention_shape(4, 2, 16)
    qkv = torch.randn(3, 8 * 16)
    norms = (torch.randn(16), torch.randn(16), 1e-6)
    positions = torch.arange(3)
    q, k, v = reference.norm_and_rotate(qkv, positions, shape, make_rope(16), norms)
    heads = qkv.view(3, 8, 16)
    k_rows = F.rms_norm(heads[:, 4:6], (16,), norms[1], 1e-6)
    torch.testing.assert_close(k, reference.rotate(k_rows, positions, make_rope(16)))
    q_rows = F.rms_norm(heads[:, :4], (16,), norms[0], 1e-6)
    torch.testing.assert_close(q, reference.rotate(q_rows, positions, make_rope(16)))
    assert torch.equal(v, heads[:, 6:])


@pytest.mark.parametrize(
    ("order", "k_view", "v_view"),
    [
        # the shape each order's name promises, then [token, dim] by permuting it
        (KvOrder.PLAIN, lambda t: t.view(16, 6), lambda t: t.view(16, 6)),
        (KvOrder.LANES, lambda t: t.view(6, 16).T, lambda t: t.view(16, 6)),
        (
            KvOrder.PAIRS,
            lambda t: t.view(3, 16, 2).permute(1, 0, 2).reshape(16, 6),
            lambda t: t.view(8, 6, 2).permute(0, 2, 1).reshape(16, 6),
        ),
    ],
)
def test_tiles_have_the_order_their_name_promises(order, k_view, v_view) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=6, dtype="float32", order=order)
    tile = torch.arange(96.0)
    k_at, v_at = reference.tile_offsets(layout)
    assert torch.equal(tile[k_at], k_view(tile))
    assert torch.equal(tile[v_at], v_view(tile))


@pytest.mark.parametrize("order", list(KvOrder))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_returns_what_was_written(order, dtype, make_step) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype, order=order)
    pool = torch.zeros((64, *layout.block_shape), dtype=getattr(torch, dtype))
    cache = reference.LayerCache(pool, layout, layer=1)
    step = make_step([(0, 37), (0, 5)])
    k, v = torch.randn(42, 2, 8), torch.randn(42, 2, 8)
    cache.write(k, v, step)
    for s, rows in ((0, slice(0, 37)), (1, slice(37, 42))):
        got_k, got_v = cache.read(step.block_tables[s], rows.stop - rows.start)
        assert torch.equal(got_k, k[rows].to(pool.dtype))
        assert torch.equal(got_v, v[rows].to(pool.dtype))
    assert not pool[:, :, [0, 2]].any(), "another layer was written"


@pytest.mark.parametrize("window", [None, 1, 7])
def test_attention_is_torchs(window, attention_shape) -> None:
    """Grouped heads, a chunk behind a prefix, a sliding window."""
    shape = attention_shape(6, 2, 16, window)
    q, k, v = torch.randn(9, 6, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    query_at, key_at = torch.arange(21, 30)[:, None], torch.arange(30)[None]
    mask = key_at <= query_at
    if window is not None:
        mask &= key_at > query_at - window
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    got = reference.attend(q, k, v, shape)
    torch.testing.assert_close(got, want[0].transpose(0, 1))


def test_a_window_of_one_is_the_value_itself(attention_shape) -> None:
    v = torch.randn(5, 2, 8)
    got = reference.attend(
        torch.randn(5, 2, 8), torch.randn(5, 2, 8), v, attention_shape(2, 2, 8, 1)
    )
    torch.testing.assert_close(got, v)


def test_paged_attention_does_not_depend_on_how_the_prompt_was_chunked(
    make_step, attention_shape
) -> None:
    shape = attention_shape(4, 2, 8)
    layout = KvLayout(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    q, k, v = torch.randn(40, 4, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    results = []
    for chunks in ([40], [1, 15, 16, 8]):
        cache = reference.LayerCache(torch.zeros((64, *layout.block_shape)), layout, 0)
        done, parts = 0, []
        for chunk in chunks:
            rows = slice(done, done + chunk)
            step = make_step([(done, chunk)])
            cache.write(k[rows], v[rows], step)
            parts.append(reference.paged_attention(q[rows], cache, step, shape))
            done += chunk
        results.append(torch.cat(parts))
    torch.testing.assert_close(*results)


def test_arithmetic_is_float64_for_float64_activations() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    assert reference.rms_norm(x, torch.ones(8), 1e-6).dtype == torch.float64
    assert reference.rms_norm(x.bfloat16(), torch.ones(8), 1e-6).dtype == torch.float32


def test_copied_blocks_chain_in_order() -> None:
    pool = torch.arange(4.0)[:, None].expand(4, 3).clone()
    reference.copy_blocks(pool, np.array([[0, 1], [1, 2]]))
    assert pool[:, 0].tolist() == [0, 0, 0, 3]
