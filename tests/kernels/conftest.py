"""Steps over a paged cache with histories, for every implementation of the operations; samplers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from quire.kernels import cpu
from quire.kernels.cpu.sampler import CpuSampler
from quire.kernels.ops import AttentionShape, Rope, StepInputs

# Triton reads this once, when first imported. With a GPU its kernels run there instead.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

MakeStep = Callable[[Sequence[tuple[int, int]]], StepInputs]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_step() -> MakeStep:
    """A step of sequences given as (tokens already in the cache, tokens of this step).

    Blocks are scattered over a pool of 64, the same for the same position in the list, so that
    steps of one test continue each other.
    """

    def make(sequences: Sequence[tuple[int, int]]) -> StepInputs:
        rng = np.random.default_rng(7)
        tables = rng.permutation(64).reshape(8, 8)[: len(sequences)]
        cached, new = np.array(sequences, np.int32).T
        query_start = np.concatenate([[0], np.cumsum(new)])
        positions = np.concatenate([np.arange(c, c + n) for c, n in sequences])
        return StepInputs(
            token_ids=(positions % 11).astype(np.int32),
            positions=positions.astype(np.int32),
            query_start=query_start.astype(np.int32),
            context_lens=(cached + new).astype(np.int32),
            block_tables=tables.astype(np.int32),
            logit_rows=(query_start[1:] - 1).astype(np.int32),
        )

    return make


@pytest.fixture
def make_rope() -> Callable[[int], Rope]:
    """Rotary tables of 128 positions for a rotary dimension."""

    def make(rotary_dim: int) -> Rope:
        frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        angle = torch.arange(128)[:, None] * frequency
        return Rope(angle.cos(), angle.sin())

    return make


@pytest.fixture
def attention_shape() -> Callable[..., AttentionShape]:
    """An attention shape with the usual scale."""

    def make(heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> AttentionShape:
        return AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, window)

    return make


@pytest.fixture(scope="module")
def cpu_samplers() -> list[CpuSampler]:
    """The compiled sampler with teams of 1, 2 and 5 threads."""
    try:
        cpu.load()
    except cpu.CpuKernelsUnavailable as error:
        pytest.skip(str(error))
    return [CpuSampler(cpu.Team(threads)) for threads in (1, 2, 5)]


@pytest.fixture(scope="module")
def one_torch_thread():
    """The truths are small: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
