"""Model runner: one rank's model, its KV pool, and the execution of step plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.engine.scheduler.plan import LogprobArrays, StepPlan, StepResult
from quire.kernels.ops import StepInputs

if TYPE_CHECKING:
    from quire.engine.runner.backend import Backend, Logits, StepLimits


class ModelRunner:
    """Executes step plans on a backend whose pool is allocated."""

    def __init__(self, backend: Backend, limits: StepLimits, num_blocks: int) -> None:
        self.backend = backend
        self.limits = limits
        self.num_blocks = num_blocks

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy blocks, compute, draw."""
        if len(plan.copies):
            self.backend.copy_blocks(plan.copies)
        logits = self.backend.compute(plan.inputs)
        drawn, invalid = np.empty(0, np.int32), np.empty(0, np.bool_)
        if len(plan.sampling.rows):
            drawn, invalid = self.backend.sample(logits, plan.sampling)
        self.backend.finish()
        return StepResult(
            token_ids=drawn,
            invalid=invalid,
            logprobs=self._drawn_logprobs(plan, logits, drawn),
            prompt_logprobs=self._prompt_logprobs(plan, logits),
        )

    def progress(self) -> float:
        """Changes while a step gets on, where that can be seen. Any thread."""
        return self.backend.progress()

    def _drawn_logprobs(
        self, plan: StepPlan, logits: Logits, drawn: np.ndarray
    ) -> LogprobArrays | None:
        draws = plan.logprob_draws
        if not len(draws):
            return None
        rows = plan.sampling.rows[draws]
        return self.backend.logprobs(logits, rows, drawn[draws], plan.num_logprobs)

    def _prompt_logprobs(self, plan: StepPlan, logits: Logits) -> LogprobArrays | None:
        if not len(plan.prompt_rows):
            return None
        top = plan.num_prompt_logprobs
        return self.backend.logprobs(logits, plan.prompt_rows, plan.prompt_targets, top)


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
