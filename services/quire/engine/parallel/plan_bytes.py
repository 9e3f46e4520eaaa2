"""What the ranks beyond the first need of a step plan, as bytes: rank 0 alone draws tokens.

int32 x 5   tokens, sequences, block table columns, logit rows, copies
int32 ...   the arrays in the order of `StepInputs`, then the copies
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.kernels.ops import StepInputs

if TYPE_CHECKING:
    from quire.engine.scheduler.plan import StepPlan

NUM_SIZES = 5


def pack(plan: StepPlan) -> bytes:
    """The plan's inputs and copies."""
    inputs = plan.inputs
    num_seqs, columns = inputs.block_tables.shape
    sizes = (len(inputs.token_ids), num_seqs, columns, len(inputs.logit_rows), len(plan.copies))
    parts = (
        np.array(sizes),
        inputs.token_ids,
        inputs.positions,
        inputs.query_start,
        inputs.context_lens,
        inputs.block_tables.reshape(-1),
        inputs.logit_rows,
        plan.copies.reshape(-1),
    )
    return np.concatenate(parts).astype(np.int32).tobytes()


def unpack(data: bytes) -> tuple[StepInputs, np.ndarray]:
    """Inputs, and copies [C, 2]. Raises ValueError for bytes that are no plan."""
    values = np.frombuffer(data, np.int32)
    tokens, seqs, columns, logit_rows, copies = values[:NUM_SIZES].tolist()
    lengths = (tokens, tokens, seqs + 1, seqs, seqs * columns, logit_rows, 2 * copies)
    if min(lengths) < 0 or NUM_SIZES + sum(lengths) != len(values):
        raise ValueError(f"{len(data)} bytes are no step plan")
    ends = NUM_SIZES + np.cumsum(lengths)
    token_ids, positions, query_start, context_lens, tables, rows, pairs = np.split(
        values[NUM_SIZES:], ends[:-1] - NUM_SIZES
    )
    inputs = StepInputs(
        token_ids=token_ids,
        positions=positions,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=tables.reshape(seqs, columns),
        logit_rows=rows,
    )
    return inputs, pairs.reshape(-1, 2)
