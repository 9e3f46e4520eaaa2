"""The continuation record of a request: what it takes to go on with it somewhere else.

The journal, not a worker, says which tokens the answer has. A token is taken in once, in order:
its batch must carry the current attempt and start where the journal ends. Text, stop strings and
logprob offsets are functions of it, so a resubmission needs nothing else.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING

from quire.proto import common_pb2, worker_pb2

if TYPE_CHECKING:
    from collections.abc import Collection

    from quire.proto.worker_pb2 import ChoiceOutput, Submit

UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED


class Verdict(Enum):
    """What to do with a batch of tokens."""

    ACCEPT = "accept"
    STALE = "stale"
    """Of an earlier attempt, already taken in, or of a choice that has ended: drop it."""
    GAP = "gap"
    """Tokens before it are missing: the worker cannot be trusted with this request."""


class Journal:
    """One submitted request: its prompt, the tokens of each choice so far, the attempt."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        """As first sent."""
        self.attempt = submit.attempt
        """Raised by the gateway alone, at each resubmission."""
        self.emitted: list[list[int]] = [[] for _ in range(max(submit.sampling.n, 1))]
        """Token ids of each choice."""
        self.open = set(range(len(self.emitted)))
        """Choices that have not ended."""
        self.is_admitted = False
        """A worker has computed the prompt; its log-probabilities, if asked for, are here."""
        self.deadline: float | None = None
        """time.monotonic() after which the answer is of no use."""
        if submit.HasField("timeout_ms"):
            self.deadline = time.monotonic() + submit.timeout_ms / 1000

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(map(len, self.emitted))

    @property
    def longest(self) -> list[int]:
        """The prompt, and behind it the tokens of the open choice that has most."""
        tokens = max((self.emitted[choice] for choice in self.open), key=len, default=[])
        return [*self.submit.prompt_token_ids, *tokens]

    def judge(self, output: ChoiceOutput) -> Verdict:
        """Whether `output` is what comes next."""
        if output.attempt != self.attempt or output.choice not in self.open:
            return Verdict.STALE
        expected = len(self.emitted[output.choice])
        if output.position == expected:
            return Verdict.ACCEPT
        return Verdict.STALE if output.position < expected else Verdict.GAP

    def take(self, output: ChoiceOutput) -> None:
        """The answer has these tokens now. Takes away what an earlier attempt has brought."""
        self.emitted[output.choice].extend(output.token_ids)
        if output.finish_reason != UNFINISHED:
            self.open.discard(output.choice)
        if output.HasField("admission"):
            if self.is_admitted:
                output.ClearField("admission")
                output.ClearField("prompt_logprobs")
            self.is_admitted = True

    def endings(self, eos_token_ids: Collection[int]) -> list[ChoiceOutput]:
        """Ends of the open choices whose last token was the last one: only saying so was lost."""
        sampling = self.submit.sampling
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
        endings = []
        for choice in sorted(self.open):
            tokens = self.emitted[choice]
            end = worker_pb2.ChoiceOutput(attempt=self.attempt, choice=choice, position=len(tokens))
            if tokens and tokens[-1] in stops:
                end.finish_reason = common_pb2.FINISH_REASON_STOP
                end.stop_token_id = tokens[-1]
            elif sampling.HasField("max_tokens") and len(tokens) >= sampling.max_tokens:
                end.finish_reason = common_pb2.FINISH_REASON_LENGTH
            else:
                continue
            endings.append(end)
        return endings

    def message(self) -> Submit:
        """The request as the current attempt sends it: behind the tokens that are there."""
        submit = worker_pb2.Submit()
        submit.CopyFrom(self.submit)
        submit.attempt = self.attempt
        if self.deadline is not None:
            submit.timeout_ms = max(1, round((self.deadline - time.monotonic()) * 1000))
        if self.is_admitted:
            submit.sampling.ClearField("prompt_logprobs")
        if self.num_tokens or len(self.open) < len(self.emitted):
            for choice in sorted(self.open):
                submit.resumed.add(choice=choice, token_ids=self.emitted[choice])
        return submit
