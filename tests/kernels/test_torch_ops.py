"""The eager operations against the reference, in every number format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quire.kernels import reference
from quire.kernels.layout import KvLayout, KvOrder
from quire.kernels.torch_ops import Residual, TorchOps

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.04, "float16": 4e-3}
DTYPES = list(TOLERANCE)


def make_ops(dtype: str = "float32", kv_heads: int = 2, head_dim: int = 16) -> TorchOps:
    return TorchOps(KvLayout(2, kv_heads, head_dim, dtype), num_blocks=64)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(
        got.double(), want.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_other_cache_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="PLAIN"):
        TorchOps(KvLayout(1, 1, 16, "float32", KvOrder.LANES), num_blocks=1)


def test_operations_before_begin_say_so() -> None:
    ops = make_ops()
    with pytest.raises(RuntimeError, match="begin"):
        ops.embed(ops.pack_embedding(torch.randn(4, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_starts_a_float32_residual_stream(dtype, make_step) -> None:
    ops, table = make_ops(dtype), torch.randn(11, 8)
    ops.begin(make_step([(0, 13), (4, 1)]))
    got = ops.embed(ops.pack_embedding(table)).settle()
    assert got.dtype == torch.float32
    rows = [*range(11), 0, 1, 4]
    assert torch.equal(got, table[rows].to(ops.dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmuls_match_the_reference(dtype) -> None:
    ops = make_ops(dtype)
    parts = [torch.randn(n, 24).to(ops.dtype) / 5 for n in (8, 4, 4)]
    x = torch.randn(3, 24).to(ops.dtype)
    bias = torch.randn(8).to(ops.dtype)
    packed = ops.pack_linear(parts, [bias, None, None])
    whole, whole_bias = torch.cat(parts), F.pad(bias, (0, 8))
    want = reference.linear(x.double(), whole, whole_bias)
    assert_close(ops.linear(x, packed), want, dtype)

    residual = torch.randn(3, 16)
    want = residual + want
    got = ops.linear_add(x, packed, Residual(residual)).settle()
    assert got.dtype == torch.float32
    assert_close(got, want, dtype)

    gate_up = ops.pack_gate_up(parts[0], parts[0] * 2)
    want = reference.gate_up_silu(x.double(), parts[0], parts[0] * 2)
    assert_close(ops.gate_up_silu(x, gate_up), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_matches_the_reference(dtype) -> None:
    ops, x, weight = make_ops(dtype), torch.randn(3, 40), torch.randn(40)
    got = ops.rms_norm(Residual(x), weight, 1e-5)
    assert got.dtype == ops.dtype
    assert_close(got, reference.rms_norm(x.double(), weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_not_rounded_below_float32(dtype, make_step) -> None:
    """Two tokens whose scores differ by less than bf16 can say must not tie."""
    ops = make_ops(dtype)
    ops.begin(make_step([(0, 3), (0, 2)]))
    x = torch.ones(5, 128).to(ops.dtype)
    table = torch.ones(5000, 128).to(ops.dtype)
    table[4321, 0] = 1.0078125
    got = ops.logits(ops.take_logit_rows(Residual(x)).stream, ops.pack_embedding(table))
    assert got.shape == (2, 5000)
    assert got.dtype == torch.float32
    assert got.argmax(1).tolist() == [4321, 4321]
    assert got[0, 4321] == 128.0078125


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize("has_norms", [False, True])
def test_cache_and_attention_match_the_reference(
    dtype, window, has_norms, make_step, make_rope, attention_shape
) -> None:
    """A prompt, its second chunk, and decodes beside another prompt."""
    shape = attention_shape(4, 2, 16, window)
    ops = make_ops(dtype)
    pool = ops.pool.clone()
    rope = make_rope(8)
    norms = (torch.randn(16), torch.randn(16), 1e-6) if has_norms else None
    for sequences in ([(0, 30), (0, 7)], [(30, 25), (7, 1)], [(55, 1), (8, 1), (0, 17)]):
        step = make_step(sequences)
        qkv = torch.randn(len(step.positions), 8 * 16).to(ops.dtype)
        ops.begin(step)
        got = ops.attention(ops.rope_and_cache(qkv, 1, shape, rope, norms), 1, shape)

        cache = reference.LayerCache(pool, ops.layout, 1)
        positions = torch.from_numpy(step.positions)
        q, k, v = reference.norm_and_rotate(qkv, positions, shape, rope, norms)
        cache.write(k, v, step)
        assert torch.equal(ops.pool, pool)
        want = reference.paged_attention(q.double(), cache, step, shape)
        assert_close(got, want.flatten(1), dtype)


def test_copied_blocks_chain_in_order() -> None:
    ops = make_ops()
    ops.pool[:] = torch.arange(64.0)[:, None, None, None, None]
    ops.copy_blocks(np.array([[3, 9], [4, 8]], np.int32))
    ops.copy_blocks(np.array([[5, 6], [6, 7]], np.int32))
    assert ops.pool[[9, 8, 6, 7], 0, 0, 0, 0].tolist() == [3, 4, 5, 5]
