"""Matmuls with integer weights, each against plain torch in float64, as a program of one step.

Runs with the instruction set that QUIRE_CPU_ISA allows; test_cpu_library.py runs it with others.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from cpu_kernels import cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.kernels import reference
from quire.kernels.layout import KvLayout
from quire.kernels.ops import StepInputs
from quire.kernels.quantized import QuantizedWeight, dequantize, quantize

LIMITS = cpu.StepLimits(max_tokens=64, max_seqs=4, max_blocks_per_seq=8, max_logit_rows=64)


@pytest.fixture(scope="module")
def team():
    return cpu.Team(2)


def make_ops(team, dtype: str = "bfloat16"):
    return cpu.CpuOps(KvLayout(1, 1, 16, dtype, cpu.KV_ORDERS[dtype]), LIMITS, team)


def integers(
    n: int, k: int, group_size: int, bits: int, *, zeros: bool = False, permuted: bool = False
) -> QuantizedWeight:
    """A matrix of every value and zero point there can be."""
    groups, half = -(-k // group_size), 2 ** (bits - 1)
    return QuantizedWeight(
        values=torch.randint(-half, half, (n, k)).to(torch.int8),
        scales=torch.rand(n, groups) + 0.1,
        zeros=torch.randint(-half, half + 1, (n, groups)).to(torch.int16) if zeros else None,
        bits=bits,
        group_size=group_size,
        order=torch.randperm(k) if permuted else None,
    )


def rows_step(rows: int) -> StepInputs:
    return StepInputs(
        token_ids=np.zeros(rows, np.int32),
        positions=np.arange(rows),
        query_start=np.array([0, rows]),
        context_lens=np.array([rows]),
        block_tables=np.arange(-(-rows // 16))[None],
        logit_rows=np.arange(rows),
    )


def fill(buffer, values: torch.Tensor) -> None:
    """Write values that the buffer's dtype holds exactly."""
    if buffer.dtype == "bfloat16":
        values = values.bfloat16().view(torch.uint16)
    buffer.array[: len(values)] = values.numpy()


def multiply(team, x: torch.Tensor, weight: QuantizedWeight, dtype: str = "bfloat16"):
    """x @ weight.T added to a float32 residual of zeros: [rows, N]."""
    ops = make_ops(team, dtype)
    given_x, residual = ops.input(x.shape[1]), ops.input(len(weight), "float32")
    out = ops.linear_add(given_x, ops.pack_linear([weight]), residual)
    fill(given_x, x)
    residual.array[:] = 0
    program = ops.finish(out, cpu.alloc_pool(ops._layout, 8))
    return torch.from_numpy(program.run(rows_step(len(x))).copy())


def block_of(weight: QuantizedWeight) -> int:
    return 128 if weight.num_groups == 1 else int(np.gcd(weight.group_size, 128))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Up to the order of a float32 sum."""
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.std()))


SHAPES = [
    (64, 256, 128), (70, 576, 128), (33, 100, 100), (96, 320, 32), (32, 48, 16), (5, 264, 264),
    (40, 512, 256),
]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_every_shape_and_number_of_rows(team, bits, zeros, n, k, group_size):
    weight = integers(n, k, group_size, bits, zeros=zeros)
    for rows in (1, 3, 8, 17):
        x = torch.randn(rows, k).bfloat16().double()
        want = reference.quantized_linear(x, weight, block_of(weight))
        assert_close(multiply(team, x, weight), want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_activations(team, dtype):
    weight = integers(40, 200, 64, 4, zeros=True)
    x = torch.randn(5, 200)
    want = reference.quantized_linear(x.double(), weight, 64)
    assert_close(multiply(team, x, weight, dtype), want)


def test_bfloat16_activations_lose_nothing_within_128_of_the_largest(team):
    weight = integers(32, 128, 128, 8)
    x = (torch.rand(4, 128) + 1 / 128).bfloat16().double()
    x[:, 0] = 0.999
    x = x.bfloat16().double()
    assert torch.equal(reference.fixed_point(x, 128), x)
    assert_close(multiply(team, x, weight), x @ dequantize(weight).double().T)


def test_a_permuted_matrix_takes_the_input_in_its_order(team):
    weight = integers(48, 160, 32, 4, permuted=True)
    x = torch.randn(3, 160).bfloat16().double()
    assert_close(multiply(team, x, weight), reference.quantized_linear(x, weight, 32))
    rms = (x @ dequantize(weight).double().T).square().mean().sqrt()
    assert (multiply(team, x, weight) - x @ dequantize(weight).double().T).abs().max() < 1e-2 * rms


def test_fused_matrices_and_a_norm_before_them(team):
    ops = make_ops(team)
    parts = [integers(n, 96, 32, 4, zeros=n == 20) for n in (20, 7, 7)]
    bias = [torch.randn(20), None, None]
    x = ops.input(96, "float32")
    out = ops.linear(ops.rms_norm(x, torch.full((96,), 0.5), 1e-6), ops.pack_linear(parts, bias))
    fill(x, values := torch.randn(9, 96))
    program = ops.finish(out, cpu.alloc_pool(ops._layout, 8))
    kinds = [name for name, _ in profile_of(program, 9)]
    assert kinds == ["NormFixedPoint", "QuantizedLinear"]
    h = reference.rms_norm(values, torch.full((96,), 0.5), 1e-6).bfloat16().double()
    want = torch.cat([reference.quantized_linear(h, part, 32) for part in parts], dim=1)
    want[:, :20] += bias[0]
    got = torch.from_numpy(program.run(rows_step(9)).copy()).view(torch.bfloat16)
    torch.testing.assert_close(got.double(), want, rtol=8e-3, atol=2e-2)


def profile_of(program, rows: int):
    program.start_profile()
    program.run(rows_step(rows))
    return program.profile()


@pytest.mark.parametrize("bits", [4, 8])
def test_gate_up_silu(team, bits):
    ops = make_ops(team, "float32")
    gate, up = (quantize(torch.randn(40, 64) / 8, bits, 32) for _ in range(2))
    x = ops.input(64)
    out = ops.gate_up_silu(x, ops.pack_gate_up(gate, up))
    fill(x, values := torch.randn(6, 64))
    got = ops.finish(out, cpu.alloc_pool(ops._layout, 8)).run(rows_step(6))
    fixed = reference.fixed_point(values.double(), 32)
    want = reference.gate_up_silu(fixed, dequantize(gate), dequantize(up))
    torch.testing.assert_close(torch.from_numpy(got).double(), want, rtol=2e-5, atol=2e-5)


def test_a_head_of_integers_gives_logits(team):
    ops = make_ops(team)
    head = quantize(torch.randn(77, 96), 8, 128)
    x = ops.input(96, of_logit_rows=True)
    out = ops.logits(x, ops.pack_head(head))
    fill(x, values := torch.randn(4, 96).bfloat16().double())
    got = ops.finish(out, cpu.alloc_pool(ops._layout, 8)).run(rows_step(4))
    assert_close(torch.from_numpy(got.copy()), reference.quantized_linear(values, head, 128))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_row_has_the_same_bits_alone_and_among_others(data):
    bits, zeros = data.draw(st.sampled_from([4, 8])), data.draw(st.booleans())
    group_size = data.draw(st.sampled_from([16, 32, 128, 10**6]))
    rows, threads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    weight = integers(70, 304, min(group_size, 304), bits, zeros=zeros)
    x = torch.randn(rows, 304).bfloat16().double()
    row = data.draw(st.integers(0, rows - 1))
    together = multiply(cpu.Team(threads), x, weight)
    assert torch.equal(together[row], multiply(cpu.Team(1), x[row : row + 1], weight)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_row_and_no_other(team, bad):
    weight = integers(40, 256, 64, 4)
    x = torch.randn(3, 256).bfloat16().double()
    clean = multiply(team, x, weight)
    x[1, 200] = bad
    found = multiply(team, x, weight)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_tiny_and_huge_activations_keep_their_size(team):
    weight = integers(8, 128, 128, 8)
    x = torch.randn(2, 128).bfloat16().double() * torch.tensor([[2.0**-90], [2.0**90]])
    want = reference.quantized_linear(x, weight, 128)
    torch.testing.assert_close(multiply(team, x, weight).double(), want, rtol=1e-4, atol=0)
    assert not multiply(team, torch.zeros(1, 128), weight).any()


def test_matrices_that_do_not_go_together_are_refused(team):
    ops = make_ops(team)
    with pytest.raises(ValueError, match="bits and group size"):
        ops.pack_linear([integers(8, 64, 32, 4), integers(8, 64, 32, 8)])
    with pytest.raises(ValueError, match="must all be quantized"):
        ops.pack_linear([integers(8, 64, 32, 4), torch.randn(8, 64)])
    with pytest.raises(ValueError, match="permute"):
        ops.pack_gate_up(integers(8, 64, 32, 4, permuted=True), integers(8, 64, 32, 4))
    with pytest.raises(ValueError, match="multiple of 16"):
        integers(8, 64, 24, 4)


SAME_BITS = "889faaca"


def test_every_instruction_set_with_fused_products_gives_the_same_bits(team):
    """Sums within a block are exact and blocks are added in one order: see gemm_quantized.h."""
    if cpu.isa() == "generic":
        pytest.skip("may round products before they are added")
    generator = np.random.default_rng(5)
    weight = QuantizedWeight(
        values=torch.from_numpy(generator.integers(-8, 8, (70, 304)).astype(np.int8)),
        scales=torch.from_numpy(generator.random((70, 10)).astype(np.float32)),
        zeros=torch.from_numpy(generator.integers(-8, 9, (70, 10)).astype(np.int16)),
        bits=4,
        group_size=32,
    )
    x = torch.from_numpy(generator.standard_normal((9, 304))).bfloat16().double()
    digest = hashlib.sha256(multiply(team, x, weight).numpy().tobytes()).hexdigest()
    assert digest[:8] == SAME_BITS
