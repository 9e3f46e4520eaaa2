"""The Triton kernels against the reference: interpreted on CPU, compiled where there is a GPU.

The interpreter truncates where a GPU rounds to bf16, so bf16 tolerances are two units.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from quire.kernels import reference  # noqa: E402
from quire.kernels.layout import KvLayout  # noqa: E402
from quire.kernels.ops import AttentionShape, StepInputs  # noqa: E402
from quire.kernels.torch_ops import Residual, TorchOps  # noqa: E402
from quire.kernels.triton.decode_plan import decode_plan  # noqa: E402
from quire.kernels.triton.kernels import TritonKernels  # noqa: E402
from quire.kernels.triton.plan import Tiling, make_plan  # noqa: E402

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.04, "float16": 4e-3}
SMALL = Tiling(whole_rows=16, keys=16, split=32)
"""Several tiles, turns and splits in contexts short enough for the interpreter."""

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled on this machine"),
    ),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    assert request.param == "cuda" or triton.knobs.runtime.interpret, (
        "triton was imported before TRITON_INTERPRET was set: see conftest.py"
    )
    return request.param


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(
        got.double().cpu(), want.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@dataclass
class Case:
    """Heads of a layer and their numbers."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    window: int | None = None
    has_norms: bool = False

    @property
    def shape(self) -> AttentionShape:
        scale = self.head_dim**-0.5
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, scale, self.window)


CASES = [
    Case("float32", 4, 2, 16, 16),
    Case("float32", 3, 1, 64, 32, window=21, has_norms=True),
    Case("bfloat16", 4, 4, 80, 80, has_norms=True),
    Case("float16", 4, 1, 96, 48, window=40),
    Case("bfloat16", 2, 1, 256, 64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.dtype}-{c.head_dim}-{c.window}")
def test_cache_and_attention_match_the_reference(case, device, make_step, make_rope) -> None:
    """Prompts, chunks behind prefixes and decodes in one step; what was never written is NaN."""
    layout = KvLayout(2, case.kv_heads, case.head_dim, case.dtype)
    ops = TorchOps(layout, 64, device, use_triton=True)
    ops.kernels = TritonKernels(SMALL)
    ops.pool.fill_(float("nan"))
    pool, shape, rope = ops.pool.cpu(), case.shape, make_rope(case.rotary)
    norms = (torch.randn(case.head_dim), torch.randn(case.head_dim), 1e-6)
    norms = norms if case.has_norms else None
    for sequences in ([(0, 19), (0, 67), (0, 1)], [(19, 20), (67, 1), (1, 2)]):
        step = make_step(sequences)
        width = (case.heads + 2 * case.kv_heads) * case.head_dim
        qkv = torch.randn(len(step.positions), width).to(ops.dtype)
        ops.begin(step)
        got_q = ops.rope_and_cache(qkv.to(device), 1, shape, rope, norms)
        got = ops.attention(got_q, 1, shape)

        cache = reference.LayerCache(pool, layout, 1)
        positions = torch.from_numpy(step.positions)
        q, k, v = reference.norm_and_rotate(qkv.double(), positions, shape, rope, norms)
        assert_close(got_q, q, case.dtype)
        cache.write(k, v, step)
        assert torch.equal(ops.pool.cpu().isnan(), pool.isnan()), "wrong slots were written"
        assert_close(ops.pool.nan_to_num(), pool.nan_to_num(), case.dtype)
        # from here on the same cache and queries, so that only attention is compared
        pool = ops.pool.cpu()
        cache = reference.LayerCache(pool, layout, 1)
        want = reference.paged_attention(got_q.cpu().double(), cache, step, shape)
        assert_close(got, want.flatten(1), case.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [64, 100])
def test_rms_norm_matches_the_reference(dtype, width, device) -> None:
    x, weight = torch.randn(3, width), torch.randn(width)
    out_dtype = getattr(torch, dtype)
    got = TritonKernels().rms_norm(Residual(x.to(device)), weight.to(device), 1e-5, out_dtype)
    assert got.dtype == out_dtype
    assert_close(got, reference.rms_norm(x.double(), weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_norm_takes_the_last_product_into_the_stream(dtype, device) -> None:
    x, product, weight = torch.randn(3, 100), torch.randn(3, 100), torch.randn(100)
    product = product.to(getattr(torch, dtype))
    residual = Residual(x.clone().to(device), product.to(device))
    got = TritonKernels().rms_norm(residual, weight.to(device), 1e-5, product.dtype)
    assert residual.product is None
    assert torch.equal(residual.stream.cpu(), x + product)
    assert_close(got, reference.rms_norm((x + product).double(), weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [64, 1100])
def test_silu_mul_matches_the_reference(dtype, width, device) -> None:
    gate_up = 4 * torch.randn(3, 2 * width).to(getattr(torch, dtype))
    got = TritonKernels().silu_mul(gate_up.to(device))
    gate, up = gate_up.double().chunk(2, dim=1)
    assert got.dtype == gate_up.dtype
    assert_close(got, torch.nn.functional.silu(gate) * up, dtype)


def test_a_row_does_not_depend_on_what_shares_its_step(
    device, make_step, make_rope, attention_shape
) -> None:
    """Bit for bit: a decode, and the second chunk of a prompt, alone and beside others."""
    shape = attention_shape(4, 2, 16)
    layout = KvLayout(1, 2, 16, "float32")
    ops = TorchOps(layout, 64, device, use_triton=True)
    ops.kernels = TritonKernels(SMALL)
    ops.pool.normal_()
    for first in ((70, 1), (33, 12)):
        alone, together = make_step([first]), make_step([first, (90, 1), (5, 30)])
        qkv = torch.randn(len(together.positions), 8 * 16, device=device)
        results = []
        for step in (alone, together):
            ops.begin(step)
            rows = qkv[: len(step.positions)]
            q = ops.rope_and_cache(rows, 0, shape, make_rope(16))
            results.append(ops.attention(q, 0, shape)[: first[1]])
        assert torch.equal(*results)


# --- the division of work -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 10, 50])
@pytest.mark.parametrize("group", [1, 3, 4, 32])
def test_items_cover_every_row_and_what_it_sees_once(window, group, make_step) -> None:
    shape = AttentionShape(group, 1, 16, 1.0, window)
    step = make_step([(0, 41), (100, 1), (63, 2), (64, 20), (0, 1)])
    plan = make_plan(step, shape, SMALL, torch.device("cpu"))
    seen: dict[int, list[tuple[int, int]]] = {}
    for work in (plan.whole, plan.split):
        assert work.tile.rows >= work.tile.tokens * group
        for _, row, tokens, position, begin, end in work.items.tolist():
            assert begin % SMALL.keys == 0
            assert 1 <= tokens <= work.tile.tokens
            for token in range(tokens):
                assert step.positions[row + token] == position + token
                seen.setdefault(row + token, []).append((begin, end))
    assert sorted(seen) == list(range(len(step.positions)))
    for row, ranges in seen.items():
        position = step.positions[row]
        first = 0 if window is None else max(0, position - window + 1)
        assert ranges[0][0] <= first
        assert ranges[-1][1] > position
        assert all(a[1] == b[0] for a, b in pairwise(ranges))


@pytest.mark.parametrize("window", [None, 10, 50])
@pytest.mark.parametrize("lengths", [[1], [70, 3, 128, 64, 70], [1, 32, 33, 5000, 4097, 64, 8]])
def test_the_gpu_divides_decodes_as_the_host_does(lengths, window, device) -> None:
    shape = AttentionShape(8, 2, 16, 1.0, window)
    want = make_plan(decodes(lengths), shape, SMALL, torch.device("cpu"))
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    got = decode_plan(positions, 5000, shape, SMALL)
    count = int(want.split.count)
    assert got.split.count.tolist() == [count]
    assert got.split.items.shape[0] >= count
    assert torch.equal(got.split.items[:count].cpu(), want.split.items)
    by_row = want.merges[want.merges[:, 0].argsort()]
    assert torch.equal(got.merges.cpu(), by_row)
    assert got.max_split_tokens == want.max_split_tokens


def decodes(lengths: list[int]) -> StepInputs:
    """A step of one row for each sequence."""
    context_lens = np.array(lengths, np.int32)
    query_start = np.arange(len(lengths) + 1, dtype=np.int32)
    rows = query_start[:-1]
    tables = np.zeros((len(lengths), -(-max(lengths) // 16)), np.int32)
    return StepInputs(rows, context_lens - 1, query_start, context_lens, tables, rows)


def busiest(lengths: list[int], programs: int) -> int:
    """Tokens of context that the busiest of the programs walks, for 8 KV heads."""
    plan = make_plan(decodes(lengths), AttentionShape(32, 8, 128, 1.0), Tiling(), CPU)
    assert plan.whole.items.shape[0] == 0
    items = plan.split.items.numpy()
    sizes = np.repeat(items[:, 5] - items[:, 4], 8)
    # a program takes every `programs`-th unit
    padded = np.pad(sizes, (0, -len(sizes) % programs))
    return int(padded.reshape(-1, programs).sum(0).max())


@pytest.mark.parametrize("programs", [132 * 3, 132 * 4])
def test_one_sequence_a_hundred_times_longer_costs_what_its_tokens_cost(programs) -> None:
    """Published for splits of a fixed number: 2.95 times the time of a uniform batch."""
    for skewed in ([128 * 1024] + [4096] * 31, [100_000] + [1000] * 63, [40_000] + [400] * 255):
        tokens = sum(skewed)
        uniform = [tokens // len(skewed)] * len(skewed)
        assert busiest(skewed, programs) <= 1.15 * busiest(uniform, programs)


# --- compilation ----------------------------------------------------------------------------------

COMPILE = """
    import triton, triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from quire.kernels.triton import attention, decode_plan, int_matmul, rms_norm, rope_cache
    from quire.kernels.triton import sample, silu_mul

    def build(kernel, consts, pointers, floats=()):
        names = kernel.arg_names
        kinds = {n: "*" + pointers[n] for n in pointers} | dict.fromkeys(floats, "fp32")
        kinds |= dict.fromkeys(consts, "constexpr")
        signature = {n: kinds.get(n, "i32") for n in names}
        constants = {(names.index(n),): value for n, value in consts.items()}
        source = ASTSource(kernel, signature, constexprs=constants)
        binary = compile(source, target=GPUTarget(*TARGET), options={"num_warps": 4})
        assert binary.metadata.shared <= 64 * 1024, binary.metadata.shared

    heads = dict(NH=32, NKV=8, HEAD_DIM=128, BLOCK_D=128)
    for is_split in (False, True):
        rows = 16 if is_split else 64
        build(
            attention._attention_kernel,
            heads | dict(WINDOW=0, PAGE=16, TILE_TOKENS=rows // 4, IS_SPLIT=is_split,
                         OPERAND=tl.bfloat16, BLOCK_M=rows, BLOCK_N=64),
            dict(q_ptr="bf16", out_ptr="bf16", partial_ptr="fp32", stats_ptr="fp32",
                 pool_ptr="bf16", tables_ptr="i32", items_ptr="i32", count_ptr="i32"),
            ["scale"],
        )
    build(
        attention._merge_kernel,
        heads | dict(TURN=16),
        dict(partial_ptr="fp32", stats_ptr="fp32", merges_ptr="i32", out_ptr="bf16"),
    )
    build(
        rope_cache._rope_cache_kernel,
        heads | dict(ROTARY=64, HAS_NORM=True, BLOCK_H=8),
        dict(qkv_ptr="bf16", q_out_ptr="bf16", pool_ptr="bf16", positions_ptr="i32",
             block_ptr="i64", slot_ptr="i64", cos_ptr="fp32", sin_ptr="fp32",
             q_norm_ptr="bf16", k_norm_ptr="bf16"),
        ["eps"],
    )
    build(
        rms_norm._rms_norm_kernel,
        dict(BLOCK=4096, HAS_PRODUCT=True),
        dict(x_ptr="fp32", product_ptr="bf16", weight_ptr="bf16", out_ptr="bf16"),
        ["eps"],
    )
    draws = dict(logits_ptr="fp32", draws_ptr="i32", largest_ptr="fp32")
    parts = dict(PARTS=32, BLOCK=1024)
    best = dict(best_ptr="fp32", token_ptr="i32")
    build(sample._largest_kernel, parts, draws)
    build(sample._score_kernel, parts, draws | best)
    build(sample._choose_kernel, dict(PARTS=32), dict(largest_ptr="fp32", out_ptr="i32") | best)
    weight = dict(words_ptr="i32", scales_ptr="bf16", zeros_ptr="bf16", out_ptr="bf16")
    for bits, group, has_zeros in ((4, 128, False), (4, 32, True), (8, 64, True)):
        kind = dict(BITS=bits, GROUP=group, HAS_ZEROS=has_zeros)
        build(
            int_matmul._int_matmul_kernel,
            kind | dict(HAS_BIAS=True, OPERAND=tl.bfloat16, SPLIT=4, BLOCK_M=16, BLOCK_N=64),
            weight | dict(x_ptr="bf16", bias_ptr="bf16", partial_ptr="fp32", counters_ptr="i32"),
        )
        build(int_matmul._dequantize_kernel, kind | dict(BLOCK=1024), weight)
    build(silu_mul._silu_mul_kernel, dict(BLOCK=1024), dict(gate_up_ptr="bf16", out_ptr="bf16"))
    build(
        decode_plan._decode_plan_kernel,
        dict(WINDOW=100, KEYS=64, SPLIT=256, MAX=128, BLOCK_MAX=64, BLOCK_ROWS=64),
        dict(positions_ptr="i32", items_ptr="i32", count_ptr="i32", merges_ptr="i32"),
    )
"""


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: t[1])
def test_kernels_compile_for_gpus_that_are_not_here(target, tmp_path) -> None:
    """The interpreter accepts much that the compiler does not; no GPU is needed to compile."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", f"TARGET = {target!r}\n{textwrap.dedent(COMPILE)}"],
        env=environment,
        check=True,
        timeout=120,
    )


def test_plans_are_made_once_per_step_and_shape(device, make_step, make_rope, attention_shape):
    layout = KvLayout(2, 1, 16, "float32")
    ops = TorchOps(layout, 64, device, use_triton=True)
    ops.begin(make_step([(0, 1)]))
    shape = attention_shape(1, 1, 16)
    for layer in (0, 1):
        q = ops.rope_and_cache(torch.randn(1, 48, device=device), layer, shape, make_rope(16))
        ops.attention(q, layer, shape)
    assert list(ops.step.plans) == [shape]
