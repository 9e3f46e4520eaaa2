"""What one step computes, as flat frozen data: what travels to every rank, and what a test can
build by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from quire.kernels.ops import StepInputs
    from quire.kernels.sampling import SamplingBatch


@dataclass(frozen=True)
class StepPlan:
    """One step: blocks to copy first, tokens to compute, then tokens to draw."""

    step: int
    inputs: StepInputs
    sampling: SamplingBatch
    copies: np.ndarray  # [C, 2] int32 (source, destination) blocks: copy-on-write
    logprob_draws: np.ndarray  # [L] int32: draws whose log-probability is wanted
    num_logprobs: int
    """Most likely tokens to return beside each; the largest that any of the L draws wants."""
    prompt_rows: np.ndarray  # [P] int32: logit rows of prompt positions
    prompt_targets: np.ndarray  # [P] int32: the prompt token that follows each
    num_prompt_logprobs: int

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.inputs.token_ids)


@dataclass(frozen=True)
class LogprobArrays:
    """Log-probabilities of L tokens and of the k most likely ones beside each."""

    logprobs: np.ndarray  # [L] float32
    ranks: np.ndarray  # [L] int32, 1 = most likely
    top_ids: np.ndarray  # [L, k] int32
    top_logprobs: np.ndarray  # [L, k] float32


class StepResult(NamedTuple):
    """What a step drew."""

    token_ids: np.ndarray  # [N] int32, one per draw
    invalid: np.ndarray  # [N], not zero: draws without a finite logit; their token means nothing
    logprobs: LogprobArrays | None = None
    prompt_logprobs: LogprobArrays | None = None
