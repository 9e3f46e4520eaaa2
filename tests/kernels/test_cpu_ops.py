"""Each kernel of the CPU library against plain torch in float64, as a program of one operation.

Runs with the instruction set that QUIRE_CPU_ISA allows; test_cpu_isas.py runs it with the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cpu_kernels import cpu

from quire.kernels import reference
from quire.kernels.layout import KvLayout
from quire.kernels.ops import AttentionShape, Rope, StepInputs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = 40


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, head size."""

    nh: int
    nkv: int
    hd: int

    def shape(self, window: int | None = None) -> AttentionShape:
        return AttentionShape(self.nh, self.nkv, self.hd, self.hd**-0.5, window)

    @property
    def columns(self) -> int:
        return (self.nh + 2 * self.nkv) * self.hd


@pytest.fixture(scope="module")
def team():
    return cpu.Team(2)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


LIMITS = cpu.StepLimits(max_tokens=80, max_seqs=8, max_blocks_per_seq=BLOCKS, max_logit_rows=80)


def layout_of(dtype: str, heads: Heads = Heads(1, 1, 16), layers: int = 2) -> KvLayout:
    return KvLayout(layers, heads.nkv, heads.hd, dtype, cpu.KV_ORDERS[dtype])


def ops_for(team, layout: KvLayout):
    return cpu.CpuOps(layout, LIMITS, team)


def tensor_of(buffer, rows: int) -> torch.Tensor:
    """The first rows of a buffer or result, in float64."""
    array = buffer if isinstance(buffer, np.ndarray) else buffer.array[:rows]
    tensor = torch.from_numpy(array.copy())
    return (tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor).double()


def fill(buffer, values: torch.Tensor) -> torch.Tensor:
    """Write values, rounded to the buffer's dtype, to its first rows; the rest becomes NaN."""
    rounded = values.to(getattr(torch, buffer.dtype))
    bits = rounded.view(torch.uint16) if buffer.dtype == "bfloat16" else rounded
    buffer.array[:] = 0x7FC0 if buffer.dtype == "bfloat16" else np.nan
    buffer.array[: len(values)] = bits.numpy()
    return rounded.double()


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    return values.to(getattr(torch, dtype))


def tolerance(dtype: str) -> dict[str, float]:
    """For results stored in the activations' dtype: float32 for fp16 models."""
    return {"bfloat16": {"rtol": 8e-3, "atol": 2e-2}}.get(dtype, {"rtol": 2e-5, "atol": 2e-5})


def rows_step(rows: int, vocabulary: int = 1) -> StepInputs:
    """One sequence of `rows` new tokens."""
    return step_of([(0, rows)], token_ids=np.arange(rows) % vocabulary)


def step_of(sequences, token_ids=None, seed: int = 0) -> StepInputs:
    """Sequences as (tokens in the cache, new tokens), over scattered blocks of their own."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(BLOCKS)
    cached, new = np.array(sequences).T
    tables = np.full((len(sequences), max(-(-(cached + new) // 16))), -1)
    for row, length in enumerate(cached + new):
        count = -(-length // 16)
        tables[row, :count], blocks = blocks[:count], blocks[count:]
    starts = np.concatenate([[0], np.cumsum(new)])
    positions = np.concatenate([np.arange(c, c + n) for c, n in sequences])
    return StepInputs(
        token_ids=np.zeros(len(positions), np.int32) if token_ids is None else token_ids,
        positions=positions,
        query_start=starts,
        context_lens=cached + new,
        block_tables=tables,
        logit_rows=np.arange(starts[-1]),
    )


def run(ops, team, result, inputs: StepInputs, layout: KvLayout, pool=None) -> torch.Tensor:
    pool = cpu.alloc_pool(layout, BLOCKS) if pool is None else pool
    return tensor_of(ops.finish(result, pool).run(inputs), 0)


SHAPES = [(1, 32, 32), (3, 17, 40), (16, 96, 64), (17, 33, 7), (33, 130, 70), (71, 64, 256)]


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(team, dtype, rows, n, k, biased):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    parts = [torch.randn(count, k).to(getattr(torch, dtype)) for count in (n - n // 3, n // 3)]
    bias = [torch.randn(len(parts[0])), None] if biased else [None, None]
    x = ops.input(k)
    out = ops.linear(x, ops.pack_linear(parts, bias))
    values = fill(x, torch.randn(rows, k))
    expected = reference.linear(values, torch.cat(parts))
    if biased:
        expected[:, : len(parts[0])] += bias[0]
    result = run(ops, team, out, rows_step(rows), layout)
    torch.testing.assert_close(result, expected, **tolerance(dtype))


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_linear_add_updates_the_residual_in_place(team, dtype, rows, n, k):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    weight = torch.randn(n, k).to(getattr(torch, dtype))
    x, residual = ops.input(k), ops.input(n, "float32")
    out = ops.linear_add(x, ops.pack_linear([weight], [torch.ones(n)]), residual)
    assert out is residual
    values, before = fill(x, torch.randn(rows, k)), fill(residual, torch.randn(rows, n))
    result = run(ops, team, out, rows_step(rows), layout)
    expected = before + reference.linear(values, weight) + 1
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_gate_up_silu(team, dtype, rows, n, k):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    gate, up = (torch.randn(n, k).to(getattr(torch, dtype)) / k**0.5 for _ in range(2))
    x = ops.input(k)
    out = ops.gate_up_silu(x, ops.pack_gate_up(gate, up))
    values = fill(x, torch.randn(rows, k))
    result = run(ops, team, out, rows_step(rows), layout)
    expected = reference.gate_up_silu(values, gate, up)
    torch.testing.assert_close(result, expected, **tolerance(dtype))


@pytest.mark.parametrize(("vocabulary", "hidden"), [(77, 33), (1000, 64)])
def test_logits_and_embedding_share_one_table(team, dtype, vocabulary, hidden):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    table = torch.randn(vocabulary, hidden).to(getattr(torch, dtype))
    packed = ops.pack_embedding(table)
    inputs = rows_step(50, vocabulary)
    embedded = run(ops, team, ops.embed(packed), inputs, layout)
    assert torch.equal(embedded, table[inputs.token_ids].double())
    x = ops.input(hidden, of_logit_rows=True)
    out = ops.logits(x, packed)
    values = fill(x, torch.randn(50, hidden))
    result = run(ops, team, out, inputs, layout)
    torch.testing.assert_close(result, reference.linear(values, table), rtol=1e-4, atol=1e-4)
    assert out.array.flags.c_contiguous


@pytest.mark.parametrize("source", DTYPES)
def test_packing_converts_any_dtype_and_reads_strided_rows(team, dtype, source):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    wide = torch.randn(48, 100).to(getattr(torch, source))
    table = wide[:, 10:60]
    embedded = run(ops, team, ops.embed(ops.pack_embedding(table)), rows_step(48, 48), layout)
    assert torch.equal(embedded, rounded(table, dtype).double())


@pytest.mark.parametrize("hidden", [16, 33, 100, 576])
def test_rms_norm(team, dtype, hidden):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    weight = torch.rand(hidden)
    x = ops.input(hidden, "float32")
    out = ops.rms_norm(x, weight, 1e-5)
    values = fill(x, torch.randn(7, hidden))
    result = run(ops, team, out, rows_step(7), layout)
    expected = reference.rms_norm(values, weight, 1e-5)
    torch.testing.assert_close(result, expected, **tolerance(dtype))


def test_take_logit_rows(team, dtype):
    layout = layout_of(dtype)
    ops = ops_for(team, layout)
    x = ops.input(50, "float32")
    out = ops.take_logit_rows(x)
    values = fill(x, torch.randn(20, 50))
    inputs = rows_step(20)
    rows = np.array([19, 3, 3, 0])
    picked = StepInputs(**{**inputs.__dict__, "logit_rows": rows})
    assert torch.equal(run(ops, team, out, picked, layout), values[rows])


def make_rope(rotary_dim: int, positions: int = 700) -> Rope:
    frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(positions)[:, None] * frequency
    return Rope(angle.cos(), angle.sin())


HEADS = [Heads(4, 2, 64), Heads(9, 3, 64), Heads(8, 1, 16), Heads(2, 2, 128), Heads(6, 3, 40),
         Heads(3, 1, 10), Heads(40, 1, 80), Heads(2, 1, 256)]  # fmt: skip

CHUNKS = [(0, 1), (3, 20), (15, 1), (16, 17), (40, 9)]


def blank_pool(layout: KvLayout) -> np.ndarray:
    """A pool of NaN: nothing unwritten may reach a result."""
    pool = cpu.alloc_pool(layout, BLOCKS)
    pool[:] = 0xFF
    return pool


def as_reference(pool: np.ndarray, layout: KvLayout, layer: int) -> reference.LayerCache:
    tensor = torch.from_numpy(pool).view(getattr(torch, layout.dtype))
    return reference.LayerCache(tensor.view(BLOCKS, *layout.block_shape), layout, layer)


def fill_cache(pool: np.ndarray, layout: KvLayout, layer: int, inputs: StepInputs) -> None:
    """Random keys and values for the whole context of each sequence."""
    cache = as_reference(pool, layout, layer)
    whole = step_of([(0, n) for n in inputs.context_lens])
    whole = StepInputs(**{**whole.__dict__, "block_tables": inputs.block_tables})
    shape = (len(whole.positions), layout.num_kv_heads, layout.head_dim)
    cache.write(torch.randn(shape), torch.randn(shape), whole)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache(team, dtype, heads, normed):
    layout = layout_of(dtype, heads)
    ops, pool = ops_for(team, layout), blank_pool(layout)
    rope = make_rope(heads.hd if normed else heads.hd // 4 * 2)
    norms = (torch.rand(heads.hd), torch.rand(heads.hd), 1e-6) if normed else None
    inputs = step_of(CHUNKS)
    x = ops.input(heads.columns)
    out = ops.rope_and_cache(x, 1, heads.shape(), rope, norms)
    values = fill(x, torch.randn(len(inputs.positions), heads.columns))
    result = run(ops, team, out, inputs, layout, pool)

    positions = torch.from_numpy(inputs.positions)
    q, k, v = reference.norm_and_rotate(values, positions, heads.shape(), rope, norms)
    torch.testing.assert_close(result[:, : heads.nh * heads.hd], q.flatten(1), **tolerance(dtype))
    expected = torch.full((BLOCKS, *layout.block_shape), torch.nan, dtype=torch.float64)
    reference.LayerCache(expected, layout, 1).write(k, v, inputs)
    written = torch.from_numpy(pool).view(getattr(torch, dtype)).double().view(expected.shape)
    close = tolerance("bfloat16") if dtype == "bfloat16" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(written, expected, equal_nan=True, **close)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 20, 1])
def test_attention(team, dtype, heads, window):
    layout = layout_of(dtype, heads)
    ops, pool = ops_for(team, layout), blank_pool(layout)
    inputs = step_of(CHUNKS)
    fill_cache(pool, layout, 1, inputs)
    shape = heads.shape(window)
    x = ops.input(heads.columns)
    out = ops.attention(x, 1, shape)
    values = fill(x, torch.randn(len(inputs.positions), heads.columns))
    result = run(ops, team, out, inputs, layout, pool)
    q = reference.split_heads(values, shape)[0]
    expected = reference.paged_attention(q, as_reference(pool, layout, 1), inputs, shape)
    torch.testing.assert_close(result, expected.flatten(1), **tolerance(dtype))


@pytest.mark.parametrize("window", [None, 300])
def test_attention_over_several_splits(team, dtype, window):
    heads = Heads(6, 2, 64)
    layout = layout_of(dtype, heads, layers=1)
    ops, pool = ops_for(team, layout), blank_pool(layout)
    inputs = step_of([(520, 40), (30, 40)])
    fill_cache(pool, layout, 0, inputs)
    shape = heads.shape(window)
    x = ops.input(heads.columns)
    out = ops.attention(x, 0, shape)
    values = fill(x, 3 * torch.randn(80, heads.columns))
    result = run(ops, team, out, inputs, layout, pool)
    q = reference.split_heads(values, shape)[0]
    expected = reference.paged_attention(q, as_reference(pool, layout, 0), inputs, shape)
    torch.testing.assert_close(result, expected.flatten(1), **tolerance(dtype))


def test_copy_blocks_in_order(team, dtype):
    layout = layout_of(dtype, Heads(9, 3, 64), layers=3)
    ops, pool = ops_for(team, layout), cpu.alloc_pool(layout, BLOCKS)
    pool[:] = np.random.default_rng(0).integers(0, 255, pool.shape)
    expected = pool.copy()
    pairs = np.array([[0, 1], [1, 5], [7, 0]])
    for source, destination in pairs:
        expected[destination] = expected[source]
    x = ops.input(8)
    ops.finish(x, pool).copy_blocks(pairs)
    assert np.array_equal(pool, expected)
