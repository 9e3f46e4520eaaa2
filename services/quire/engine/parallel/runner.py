"""The model runner of rank 0: what it executes, the other ranks execute with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quire.engine.runner.runner import ModelRunner

if TYPE_CHECKING:
    from quire.engine.runner.runner import Wait
    from quire.engine.scheduler.plan import StepPlan


class Followers(Protocol):
    """The other ranks, as rank 0 steps them."""

    def send(self, plan: StepPlan) -> None:
        """Have every other rank execute the plan. Raises RankFailed."""

    def check(self) -> None:
        """Raises RankFailed when another rank has been lost."""

    def give_up(self, error: Exception) -> None:
        """An exchange failed here: end every rank. Raises RankFailed when another rank is why."""


class ParallelRunner(ModelRunner):
    """Executes step plans together with the other ranks; draws tokens here."""

    def __init__(self, own: ModelRunner, followers: Followers) -> None:
        super().__init__(own.backend, own.limits, own.num_blocks)
        self._followers = followers

    def launch(self, plan: StepPlan) -> Wait:
        """Copy blocks and compute on every rank, draw on this one. The others are told the tokens
        with the next plan, so a step is complete when this returns."""
        self._followers.send(plan)
        try:
            result = super().launch(plan)()
        except Exception as error:
            self._followers.give_up(error)
            raise
        self._followers.check()  # an exchange between GPUs that is broken off raises nothing
        return lambda: result
