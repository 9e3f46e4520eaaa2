"""Captured decode steps: what a replay computes from the static buffers is what a step computes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from graph_backends import graph_backend, load_llama, step_of
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, VOCAB, build

from quire.engine.runner.backend import StepLimits, TorchBackend
from quire.engine.runner.graphs import bucket_sizes, is_decode, pad_decode
from quire.kernels.ops import drawn_as

pytest.importorskip("triton")

# where there is a GPU, these are its tests
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
LIMITS = StepLimits(max_tokens=64, max_seqs=5, max_blocks_per_seq=8, max_logit_rows=16)
NUM_BLOCKS = 12
TABLES = [[3, 9], [7], [0, 11], [8], [1]]
LENGTHS = [21, 3, 16, 15, 1]
"""Tokens in the cache."""
TINY_WINDOWS = next(tiny for tiny in TINY if tiny.name == "qwen2-windows")
"""Two attention shapes in one step."""


@given(st.integers(1, 300))
def test_buckets_reach_every_batch_with_little_padding(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    assert {1, 2, 4, 8, 16} & set(range(1, max_num_seqs)) <= set(sizes)
    assert all(b - a <= max(a, 16) for a, b in pairwise(sizes))


def test_padded_rows_are_sequences_of_one_token_in_the_scratch_block() -> None:
    step = step_of([([5], 20, [3, 9]), ([6], 2, [7])])
    padded = pad_decode(step, 4, 12)
    assert is_decode(padded)
    assert padded.token_ids.tolist() == [5, 6, 0, 0]
    assert padded.positions.tolist() == [20, 2, 0, 0]
    assert padded.context_lens.tolist() == [21, 3, 1, 1]
    assert padded.block_tables.tolist() == [[3, 9], [7, 0], [12, 0], [12, 0]]
    assert padded.query_start.tolist() == [0, 1, 2, 3, 4]
    assert padded.logit_rows.tolist() == [0, 1, 2, 3]
    assert step.block_tables.tolist() == [[3, 9], [7, 0]], "the step itself is not touched"


def test_a_step_with_a_chunk_of_a_prompt_is_no_decode() -> None:
    assert not is_decode(step_of([([5], 20, [3, 9]), ([6, 7], 2, [7])]))


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """A backend with its graphs, and prompts in its pool."""
    folder = tmp_path_factory.mktemp("model")
    build(TINY_WINDOWS, folder)
    made = graph_backend(folder, LIMITS)
    made.allocate(load_llama(folder, made), NUM_BLOCKS)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]
    made.compute(step_of([(p, 0, t) for p, t in zip(prompts, TABLES, strict=True)]))
    return made


def decode(count: int, token: int = 11):
    """The next row of the first `count` sequences."""
    rows = zip(LENGTHS, TABLES, range(token, token + count), strict=False)
    return step_of([([t], length, table) for length, table, t in rows])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_replay_gives_the_bits_of_the_padded_step_and_fills_the_pool_likewise(
    backend, count
) -> None:
    before = backend.ops.pool.clone()
    step = decode(count)
    got = backend.compute(step).clone()
    after = backend.ops.pool.clone()
    size = next(b for b in backend.graphs.buckets if b >= count)

    backend.ops.pool.copy_(before)
    padded = pad_decode(step, size, NUM_BLOCKS)
    want = TorchBackend.compute(backend, padded)
    assert got.shape == (count, VOCAB)
    assert torch.equal(got, want[:count])
    assert torch.equal(backend.ops.pool, after)

    # and what the step alone gives, but for the order of sums in a matmul of other size
    backend.ops.pool.copy_(before)
    alone = TorchBackend.compute(backend, step)
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backend.ops.pool[:NUM_BLOCKS], after[:NUM_BLOCKS])


def test_a_replay_reads_the_step_anew(backend) -> None:
    """Other tokens, lengths and tables in the same bucket, then the first step again."""
    first = backend.compute(decode(3)).clone()
    other = step_of([([5], 15, [8]), ([6], 1, [1]), ([7], 3, [7])])
    assert not torch.equal(backend.compute(other), first)
    assert torch.equal(backend.compute(decode(3)), first)


@pytest.mark.parametrize("width", [1, 2])
def test_tokens_that_the_host_does_not_know_yet_are_those_drawn_last(backend, width) -> None:
    """In a graph (one row each), and in a step with a chunk of a prompt."""
    known = step_of([([11] * width, 21, [3, 9]), ([12], 3, [7]), ([13], 16, [0, 11])])
    want = backend.compute(known).clone()
    backend.ops.drawn = torch.tensor([13, 40, 12, 11], dtype=torch.int32, device=backend.ops.device)
    ids = known.token_ids.copy()
    ids[-2:] = [drawn_as(2), drawn_as(0)]
    assert torch.equal(backend.compute(replace(known, token_ids=ids)), want)


def test_only_wanted_logits_are_returned(backend) -> None:
    every = backend.compute(decode(3)).clone()
    some = backend.compute(replace(decode(3), logit_rows=np.array([2, 0], np.int32)))
    assert torch.equal(some, every[[2, 0]])
    none = backend.compute(replace(decode(3), logit_rows=np.empty(0, np.int32)))
    assert none.shape == (0, VOCAB)


def test_a_new_pool_gets_new_graphs(backend) -> None:
    step, old = decode(2), backend.graphs
    want = backend.compute(step).clone()
    pool, model = backend.ops.pool.clone(), backend._model
    backend.allocate(model, NUM_BLOCKS)
    assert backend.graphs is not old
    assert not torch.equal(backend.compute(step), want), "an empty pool"
    backend.ops.pool.copy_(pool)
    assert torch.equal(backend.compute(step), want)
