"""A row's result on the CPU has the same bits whatever else its step computes.

A small model is recorded once per dtype; its logits for every token of some sequences, each
computed whole and alone, are what any other way of computing them must repeat exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cpu_kernels import cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.kernels.layout import KvLayout
from quire.kernels.ops import AttentionShape, Rope, StepInputs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = ("float32", "bfloat16", "float16")
VOCABULARY, HIDDEN, INTER, LAYERS = 83, 72, 100, 2
MAX_TOKENS, BLOCKS = 400, 96
LENGTHS = (5, 37, 64, 290)
"""The last one runs over two splits of the context."""


@dataclass(frozen=True)
class Case:
    """One model: dtype, heads and the window of its second layer."""

    dtype: str
    nh: int = 6
    nkv: int = 2
    hd: int = 32
    window: int | None = None


CASES = [
    *(Case(dtype) for dtype in DTYPES),
    *(Case(dtype, nh=3, nkv=3, hd=48, window=21) for dtype in DTYPES),
    Case("bfloat16", nh=4, nkv=1, hd=20),
]


class Model:
    """A recorded decoder with random weights over a pool of its own."""

    def __init__(self, case: Case, num_threads: int) -> None:
        generator = torch.Generator().manual_seed(5)

        def weight(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k, generator=generator).to(getattr(torch, case.dtype)) / k**0.5

        order = cpu.KV_ORDERS[case.dtype]
        self.layout = KvLayout(LAYERS, case.nkv, case.hd, case.dtype, order)
        limits = cpu.StepLimits(
            max_tokens=MAX_TOKENS, max_seqs=16, max_blocks_per_seq=32, max_logit_rows=MAX_TOKENS
        )
        ops = cpu.CpuOps(self.layout, limits, cpu.Team(num_threads))
        angle = torch.arange(512)[:, None] * 0.1 ** torch.arange(case.hd // 2)
        rope = Rope(angle.cos(), angle.sin())
        ones, head_ones = torch.ones(HIDDEN), torch.ones(case.hd)
        qkv_rows = (case.nh + 2 * case.nkv) * case.hd
        table = ops.pack_embedding(weight(VOCABULARY, HIDDEN) * 8)
        x = ops.embed(table)
        for layer in range(LAYERS):
            window = case.window if layer == 1 else None
            shape = AttentionShape(case.nh, case.nkv, case.hd, case.hd**-0.5, window)
            bias = torch.randn(qkv_rows, generator=generator)
            qkv = ops.linear(
                ops.rms_norm(x, ones, 1e-6), ops.pack_linear([weight(qkv_rows, HIDDEN)], [bias])
            )
            qkv = ops.rope_and_cache(qkv, layer, shape, rope, (head_ones, head_ones, 1e-6))
            heads = ops.attention(qkv, layer, shape)
            x = ops.linear_add(heads, ops.pack_linear([weight(HIDDEN, case.nh * case.hd)]), x)
            gate_up = ops.pack_gate_up(weight(INTER, HIDDEN), weight(INTER, HIDDEN))
            inner = ops.gate_up_silu(ops.rms_norm(x, ones, 1e-6), gate_up)
            x = ops.linear_add(inner, ops.pack_linear([weight(HIDDEN, INTER)]), x)
            del qkv, heads, inner
        logits = ops.logits(ops.rms_norm(ops.take_logit_rows(x), ones, 1e-6), table)
        self.pool = cpu.alloc_pool(self.layout, BLOCKS)
        self.program = ops.finish(logits, self.pool)

    def poison(self) -> None:
        """Fill the whole pool with NaN."""
        self.pool[:] = 0xFF

    def logits(self, inputs: StepInputs) -> np.ndarray:
        return self.program.run(inputs).copy().view(np.uint32)


@functools.cache
def model_of(case: Case, num_threads: int = 2) -> Model:
    return Model(case, num_threads)


def tokens_of(sequence: int) -> np.ndarray:
    return np.random.default_rng(sequence).integers(0, VOCABULARY, LENGTHS[sequence])


@dataclass(frozen=True)
class Part:
    """Tokens [begin, end) of one of the sequences."""

    sequence: int
    begin: int
    end: int


def step_of(parts: list[Part], tables: dict[int, np.ndarray]) -> StepInputs:
    width = max(len(table) for table in tables.values())
    padded = [np.pad(tables[p.sequence], (0, width - len(tables[p.sequence]))) for p in parts]
    starts = np.cumsum([0, *(p.end - p.begin for p in parts)])
    return StepInputs(
        token_ids=np.concatenate([tokens_of(p.sequence)[p.begin : p.end] for p in parts]),
        positions=np.concatenate([np.arange(p.begin, p.end) for p in parts]),
        query_start=starts,
        context_lens=np.array([p.end for p in parts]),
        block_tables=np.stack(padded),
        logit_rows=np.arange(starts[-1]),
    )


def scattered_tables(seed: int) -> dict[int, np.ndarray]:
    blocks = np.random.default_rng(seed).permutation(BLOCKS)
    tables = {}
    for sequence, length in enumerate(LENGTHS):
        count = -(-length // 16)
        tables[sequence], blocks = blocks[:count], blocks[count:]
    return tables


@functools.cache
def whole_and_alone(case: Case) -> tuple[np.ndarray, ...]:
    """Bits of the logits of every token, each sequence in one step by itself, on one thread."""
    model, tables = model_of(case, 1), scattered_tables(0)
    model.poison()
    return tuple(
        model.logits(step_of([Part(sequence, 0, length)], tables))
        for sequence, length in enumerate(LENGTHS)
    )


def compute(model: Model, steps: list[list[Part]], seed: int) -> list[np.ndarray]:
    """Logits of all tokens when the parts are computed in these steps."""
    model.poison()
    tables = scattered_tables(seed)
    found = [np.zeros((length, VOCABULARY), np.uint32) for length in LENGTHS]
    for parts in steps:
        bits = model.logits(step_of(parts, tables))
        row = 0
        for part in parts:
            count = part.end - part.begin
            found[part.sequence][part.begin : part.end] = bits[row : row + count]
            row += count
    return found


def assert_same_bits(found: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> None:
    for sequence, (a, b) in enumerate(zip(found, expected, strict=True)):
        rows = np.flatnonzero((a != b).any(1))
        assert not rows.size, f"sequence {sequence} differs at positions {rows[:10]}"


def test_logits_are_finite_over_a_poisoned_pool():
    for case in CASES:
        for bits in whole_and_alone(case):
            assert np.isfinite(bits.view(np.float32)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_batched_equals_alone(case, num_threads):
    order = [2, 0, 3, 1]
    step = [Part(sequence, 0, LENGTHS[sequence]) for sequence in order]
    found = compute(model_of(case, num_threads), [step], seed=1)
    assert_same_bits(found, whole_and_alone(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_whole(case):
    """Sequences decode together, each from its own position on; the last one a long context."""
    begins = (0, 6, 33, 240)
    prompts = [Part(s, 0, begin) for s, begin in enumerate(begins) if begin]
    steps = [prompts]
    for i in range(60):
        parts = [
            Part(s, begin + i, begin + i + 1)
            for s, begin in enumerate(begins)
            if begin + i < LENGTHS[s]
        ]
        steps += [parts] if parts else []
    found = compute(model_of(case), steps, seed=2)
    assert_same_bits(found, whole_and_alone(case))


@st.composite
def schedules(draw: st.DrawFn) -> list[list[Part]]:
    """Any mix of chunks: each step takes some of the unfinished sequences some tokens further."""
    done = [0] * len(LENGTHS)
    steps = []
    while any(d < length for d, length in zip(done, LENGTHS, strict=True)):
        left = [s for s, length in enumerate(LENGTHS) if done[s] < length]
        chosen = draw(st.permutations(left))[: draw(st.integers(1, len(left)))]
        parts = []
        for s in chosen:
            size = draw(st.one_of(st.integers(1, 20), st.integers(60, 290)))
            end = min(LENGTHS[s], done[s] + size)
            parts.append(Part(s, done[s], end))
            done[s] = end
        steps.append(parts)
    return steps


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    case=st.sampled_from(CASES),
    num_threads=st.sampled_from([1, 2]),
    schedule=schedules(),
    seed=st.integers(0, 1000),
)
def test_any_schedule_gives_the_same_bits(case, num_threads, schedule, seed):
    found = compute(model_of(case, num_threads), schedule, seed)
    assert_same_bits(found, whole_and_alone(case))


def test_replay_equals_operations_one_by_one():
    for case in CASES[:3]:
        model, tables = model_of(case), scattered_tables(3)
        model.poison()
        step = step_of([Part(1, 0, 37), Part(3, 0, 290)], tables)
        whole = model.logits(step)
        model.poison()
        for op in range(len(model.program)):
            model.program.run_ops(step, op, op + 1)
        result = model.program._result.array[:327].view(np.uint32)
        assert np.array_equal(whole, result)
