"""Model runner: one rank's model, its KV pool, and the execution of step plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quire.engine.scheduler.plan import LogprobArrays, StepPlan, StepResult
from quire.kernels.ops import StepInputs, drawn_as

if TYPE_CHECKING:
    from quire.engine.runner.backend import Arrays, Backend, Fetched, StepLimits
    from quire.engine.runner.stream import HostStream

Wait = Callable[[], StepResult]
"""Returns a launched step's result when the step is complete. To be called once."""


class ModelRunner:
    """Executes step plans, in the order they are launched, on a backend whose pool is allocated."""

    def __init__(
        self,
        backend: Backend,
        limits: StepLimits,
        num_blocks: int,
        stream: HostStream | None = None,
    ) -> None:
        """`stream`: where steps run on a backend that computes before it returns, for `launch` to
        return at once all the same."""
        self.backend = backend
        self.limits = limits
        self.num_blocks = num_blocks
        self._stream = stream

    def launch(self, plan: StepPlan) -> Wait:
        """Start a step: copy blocks, compute, draw. What is returned waits until it is complete.

        What is said of its blocks holds from then on: a block that it wrote can be sent, one that
        it used last can be given away and received into.
        """
        if self._stream is None:
            return self._start(plan)
        return self._stream.submit(lambda: self._start(plan)())

    def progress(self) -> float:
        """Changes while a step gets on, where that can be seen. Any thread."""
        return self.backend.progress()

    def _start(self, plan: StepPlan) -> Wait:
        backend = self.backend
        if len(plan.copies):
            backend.copy_blocks(plan.copies)
        drawn: Arrays = ()
        scores: Arrays = ()
        prompt_scores: Arrays = ()
        sample = backend.sampler(plan.sampling) if len(plan.sampling.rows) else None
        logits = backend.compute(plan.inputs)
        if sample is not None:
            drawn = sample(logits)
        if len(draws := plan.logprob_draws):
            rows = plan.sampling.rows[draws]
            scores = backend.logprobs(logits, rows, drawn_as(draws), plan.num_logprobs)
        if len(rows := plan.prompt_rows):
            top = plan.num_prompt_logprobs
            prompt_scores = backend.logprobs(logits, rows, plan.prompt_targets, top)
        return partial(_result, backend.fetch((drawn, scores, prompt_scores)))


def _result(fetched: Fetched) -> StepResult:
    """Of a step, once it is complete."""
    drawn, scores, prompt_scores = fetched()
    token_ids, invalid = drawn or (np.empty(0, np.int32), np.empty(0, np.bool_))
    return StepResult(
        token_ids=token_ids,
        invalid=invalid,
        logprobs=LogprobArrays(*scores) if scores else None,
        prompt_logprobs=LogprobArrays(*prompt_scores) if prompt_scores else None,
    )


def largest_step(limits: StepLimits, num_blocks: int) -> StepInputs:
    """A step as large as `limits` allow on `num_blocks` blocks: for profiling and warm-up.

    One long prompt of token 0 with, beside it, as many one-token sequences as there are seats.
    """
    blocks = min(num_blocks, limits.max_blocks_per_seq)
    singles = min(limits.max_seqs - 1, limits.max_tokens - 1)
    prompt = min(limits.max_tokens - singles, blocks * 16)
    lengths = np.array([prompt] + [1] * singles, np.int32)
    tables = np.zeros((1 + singles, blocks), np.int32)
    tables[0] = np.arange(blocks)
    num_tokens = int(lengths.sum())
    return StepInputs(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.concatenate([np.arange(prompt), np.zeros(singles)]).astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        context_lens=lengths,
        block_tables=tables,
        logit_rows=np.arange(min(num_tokens, limits.max_logit_rows), dtype=np.int32),
    )
