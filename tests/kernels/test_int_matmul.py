"""Integer weights: packing, the small-batch matmul and dequantization against plain arithmetic."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from quire.kernels.triton.int_matmul import dequantize, int_matmul, pack_int  # noqa: E402
from quire.kernels.triton.tuned import MatmulTiling  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# where there is a GPU, these are its tests
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 4e-3}


def checkpoint(bits: int, n: int, k: int, group: int) -> tuple[torch.Tensor, ...]:
    """(words, scales, zeros, values): consecutive weights of a row in one word, lowest first."""
    values = torch.randint(0, 1 << bits, (n, k))
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits)
    words = (values.view(n, -1, per_word) << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scales = torch.rand(n, k // group) / 50 + 0.01
    return words, scales, torch.randint(0, 1 << bits, (n, k // group)), values


def weights(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int, group: int
) -> torch.Tensor:
    """What the integers mean, float64 [N, K]."""
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.repeat_interleave(group, 1)
    return (values - zeros).double() * scales.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("bits", "group", "has_zeros"), [(4, 128, False), (4, 32, True), (8, 64, True), (8, 256, False)]
)
def test_the_matmul_is_that_of_the_dequantized_weight(dtype, bits, group, has_zeros) -> None:
    n, k = 40, 256  # more than a column block
    words, scales, zeros, values = checkpoint(bits, n, k, group)
    scales, bias = (t.to(getattr(torch, dtype)) for t in (scales, torch.randn(n)))
    x = torch.randn(5, k).to(scales.dtype)
    packed = pack_int(
        words.to(DEVICE),
        scales.to(DEVICE),
        zeros.to(DEVICE) if has_zeros else None,
        bits,
        bias.to(DEVICE),
    )
    assert packed.shape == (n, k)
    assert packed.group == group
    plain = weights(values, scales, zeros if has_zeros else 1 << (bits - 1), group)
    want = x.double() @ plain.T + bias.double()
    bound = TOLERANCE[dtype] * float(want.abs().max())
    for split in (1, 2):
        got = int_matmul(x.to(DEVICE), packed, MatmulTiling(block_n=32, split=split))
        assert got.dtype == x.dtype
        assert float((got.cpu().double() - want).abs().max()) < bound, split
    many = int_matmul(x.repeat(20, 1).to(DEVICE), packed).cpu().double()
    assert float((many - want.repeat(20, 1)).abs().max()) < bound
    exact = dequantize(packed).cpu().double()
    assert torch.allclose(exact, plain, rtol=TOLERANCE[dtype], atol=0)


def test_counters_are_left_as_they_were_found() -> None:
    """A second call sums anew: programs that count themselves start from zero."""
    words, scales, _, _ = checkpoint(4, 64, 512, 128)
    packed, x = pack_int(words.to(DEVICE), scales.to(DEVICE)), torch.randn(2, 512, device=DEVICE)
    tiling = MatmulTiling(block_n=32, split=4)
    first = int_matmul(x, packed, tiling)
    assert torch.equal(int_matmul(x, packed, tiling), first)


def test_a_row_does_not_depend_on_the_batch() -> None:
    words, scales, _, _ = checkpoint(4, 32, 256, 64)
    packed, x = pack_int(words.to(DEVICE), scales.to(DEVICE)), torch.randn(9, 256, device=DEVICE)
    tiling = MatmulTiling(block_n=32, split=2)
    together = int_matmul(x, packed, tiling)
    assert torch.equal(int_matmul(x[4:5], packed, tiling)[0], together[4])


@pytest.mark.parametrize(
    ("k", "groups", "bits"), [(64, 1, 4), (256, 3, 4), (256, 32, 4), (96, 1, 8)]
)
def test_sizes_that_do_not_fit_are_refused(k, groups, bits) -> None:
    words = torch.zeros(2, k * bits // 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of"):
        pack_int(words, torch.ones(2, groups), bits=bits)
