"""Moves log-probabilities from a step's result arrays to the requests that asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.engine.output import ChoiceOutput, TokenLogprob

if TYPE_CHECKING:
    from quire.engine.request import Sequence
    from quire.engine.scheduler.batch import ScheduledStep
    from quire.engine.scheduler.plan import LogprobArrays, StepPlan, StepResult


def take_prompt_logprobs(scheduled: ScheduledStep, result: StepResult) -> None:
    """Append the step's prompt log-probabilities to their requests."""
    if result.prompt_logprobs is None:
        return
    row = 0
    for seq, count in scheduled.prompt_logprobs:
        num_top = seq.state.request.params.prompt_logprobs or 0
        entries = [_entry(result.prompt_logprobs, row + i, num_top) for i in range(count)]
        seq.state.prompt_logprobs.extend(entries)
        row += count


def add_logprobs(
    outputs: dict[int, ChoiceOutput], drawn: list[Sequence], plan: StepPlan, result: StepResult
) -> None:
    """Put the log-probability of each draw that wants it into its output, given by draw."""
    if result.logprobs is None:
        return
    for row, draw in enumerate(plan.logprob_draws.tolist()):
        num_top = drawn[draw].state.request.params.logprobs or 0
        if draw in outputs:
            outputs[draw].logprobs = [_entry(result.logprobs, row, num_top)]


def _entry(arrays: LogprobArrays, row: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(
        float(arrays.logprobs[row]),
        int(arrays.ranks[row]),
        arrays.top_ids[row, :num_top].tolist(),
        arrays.top_logprobs[row, :num_top].tolist(),
    )
