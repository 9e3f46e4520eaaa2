"""A runner without a model, for tests and simulations of everything around one.

Its "KV cache" remembers which token was written to which slot, and the token it draws is a hash of
the whole context as read back through the block table. So a block that was lost, shared by mistake,
overwritten or reused too early changes the output, exactly where a real model's would.
"""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from quire.engine.request import BLOCK_SIZE
from quire.engine.scheduler.plan import LogprobArrays, StepPlan, StepResult
from quire.kernels.ops import with_drawn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.engine.runner.backend import StepLimits
    from quire.engine.runner.runner import Wait

EMPTY = -1


def expected_token(context: Sequence[int], draw: tuple[int, int], vocab_size: int) -> int:
    """The token that follows `context` for a draw (seed, choice)."""
    data = np.array([*context, *draw], np.int64).tobytes()
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "little") % vocab_size


class FakeRunner:
    """Executes step plans as `ModelRunner` does, over a cache of token ids."""

    def __init__(self, num_blocks: int, vocab_size: int, limits: StepLimits) -> None:
        self.num_blocks = num_blocks
        self.limits = limits
        self.vocab_size = vocab_size
        self.broken_seeds: set[int] = set()
        """Seeds of requests for which the model gives no number."""
        self.operations = 0
        """What `progress` shows."""
        self.slots = np.full((num_blocks, BLOCK_SIZE), EMPTY, np.int64)
        self._drawn = np.empty(0, np.int32)

    def launch(self, plan: StepPlan) -> Wait:
        """The step runs when it is waited for, as late as any device may: what it uses must still
        be there."""
        return partial(self._execute, plan)

    def _execute(self, plan: StepPlan) -> StepResult:
        """Write the step's tokens, then draw from what the cache holds."""
        for source, destination in plan.copies.tolist():
            self.slots[destination] = self.slots[source]
        inputs = plan.inputs
        owner = np.repeat(np.arange(len(inputs.context_lens)), np.diff(inputs.query_start))
        blocks = inputs.block_tables[owner, inputs.positions // BLOCK_SIZE]
        token_ids = with_drawn(inputs.token_ids, self._drawn)
        self.slots[blocks, inputs.positions % BLOCK_SIZE] = token_ids
        sampling = plan.sampling
        tokens = []
        for i, logit_row in enumerate(sampling.rows.tolist()):
            row = int(inputs.logit_rows[logit_row])
            context = self._read(inputs.block_tables[owner[row]], int(inputs.positions[row]) + 1)
            if int(sampling.position[i]) != len(context):
                raise AssertionError("a draw's position is not the length of its context")
            draw = (int(sampling.rules["seed"][i]), int(sampling.rules["choice"][i]))
            tokens.append(expected_token(context, draw, self.vocab_size))
        self._drawn = np.array(tokens, np.int32)
        return StepResult(
            token_ids=self._drawn,
            invalid=np.isin(sampling.rules["seed"], list(self.broken_seeds)),
            logprobs=_zeros(len(plan.logprob_draws), plan.num_logprobs),
            prompt_logprobs=_zeros(len(plan.prompt_rows), plan.num_prompt_logprobs),
        )

    def progress(self) -> float:
        """What the test says."""
        return float(self.operations)

    def _read(self, block_table: np.ndarray, length: int) -> list[int]:
        blocks = block_table[: -(-length // BLOCK_SIZE)]
        context: list[int] = self.slots[blocks].reshape(-1)[:length].tolist()
        if EMPTY in context:
            raise AssertionError("the context has a slot that was never written")
        return context


def _zeros(count: int, num_top: int) -> LogprobArrays | None:
    if not count:
        return None
    return LogprobArrays(
        np.zeros(count, np.float32),
        np.ones(count, np.int32),
        np.zeros((count, num_top), np.int32),
        np.zeros((count, num_top), np.float32),
    )
