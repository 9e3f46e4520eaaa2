"""Step plans as they travel to other ranks."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.parallel.plan_bytes import pack, unpack
from quire.kernels.ops import StepInputs


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    columns=st.integers(0, 4),
    logit_rows=st.integers(0, 5),
    copies=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_plan_arrives_as_it_was(lengths, columns, logit_rows, copies, seed):
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**31 - 1, shape, dtype=np.int32)

    tokens, seqs = sum(lengths), len(lengths)
    inputs = StepInputs(
        token_ids=numbers(tokens),
        positions=numbers(tokens),
        query_start=numbers(seqs + 1),
        context_lens=numbers(seqs),
        block_tables=numbers(seqs, columns),
        logit_rows=numbers(logit_rows),
    )
    plan = SimpleNamespace(inputs=inputs, copies=numbers(copies, 2))
    got, got_copies = unpack(pack(plan))
    for field in fields(StepInputs):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(inputs, field.name))
    np.testing.assert_array_equal(got_copies, plan.copies)


@pytest.mark.parametrize("values", [[1, 1, 0, 0, 0], [-1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 7]])
def test_what_is_no_plan_is_refused(values):
    with pytest.raises(ValueError, match="no step plan"):
        unpack(np.array(values, np.int32).tobytes())
