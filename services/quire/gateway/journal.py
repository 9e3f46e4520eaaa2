"""The continuation record of a request: what it takes to go on with it somewhere else.

The journal, not a worker, says which tokens the answer has. A token is taken in once, in order:
its batch must carry the current attempt and start where the journal ends. Text, stop strings and
logprob offsets are functions of it, so a resubmission needs nothing else.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.proto.worker_pb2 import ChoiceOutput, Submit


class Verdict(Enum):
    """What to do with a batch of tokens."""

    ACCEPT = "accept"
    STALE = "stale"
    """Of an earlier attempt, or already taken in: drop it."""
    GAP = "gap"
    """Tokens before it are missing: the worker cannot be trusted with this request."""


class Journal:
    """One submitted request: its prompt, the tokens of each choice so far, the attempt."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        """As first sent."""
        self.attempt = submit.attempt
        """Raised by the gateway alone, at each resubmission."""
        self.emitted: list[list[int]] = [[] for _ in range(submit.sampling.n)]
        """Token ids of each choice."""

    def judge(self, output: ChoiceOutput) -> Verdict:
        """Whether `output` is what comes next."""
        if output.attempt != self.attempt or output.choice >= len(self.emitted):
            return Verdict.STALE
        expected = len(self.emitted[output.choice])
        if output.position == expected:
            return Verdict.ACCEPT
        return Verdict.STALE if output.position < expected else Verdict.GAP

    def append(self, choice: int, token_ids: list[int]) -> None:
        """The answer has these tokens now."""
        self.emitted[choice].extend(token_ids)
