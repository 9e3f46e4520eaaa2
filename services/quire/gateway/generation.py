"""All choices of one HTTP request, growing as tokens arrive.

Choice `p * n + c` is choice `c` of prompt `p`; each prompt is one request to the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.api.openai import Usage
from quire.proto import common_pb2, worker_pb2
from quire.text.output import ChoiceText, End

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.api.sampling import SamplingParams
    from quire.gateway.prompts import Prompt
    from quire.gateway.replies import Replies
    from quire.gateway.request import GenerationRequest
    from quire.gateway.traffic import RequestClock
    from quire.proto.common_pb2 import TokenLogprob
    from quire.text.output import TextDelta
    from quire.text.tokenizer import Tokenizer

_REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_DEADLINE: "deadline",
}


class Generation:
    """What a request has produced so far."""

    def __init__(
        self,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        submits: Sequence[worker_pb2.Submit],
    ) -> None:
        self.submits = submits
        self.request = request
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.n = request.params.n
        self.choices = [ChoiceText(tokenizer, request.params) for _ in range(len(prompts) * self.n)]
        self.prompt_scores: dict[int, Sequence[TokenLogprob]] = {}
        """By prompt; entry i is for its token i + 1."""
        self._cached_tokens = 0
        self._open = len(self.choices)

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return self._open == 0

    @property
    def needs_no_worker(self) -> bool:
        """The prompt is to be echoed, and nothing else."""
        request = self.request
        return (
            request.max_tokens == 0
            and request.params.prompt_logprobs is None
            and not (request.delivery.stream)
        )

    @property
    def usage(self) -> Usage:
        """Tokens so far. Tokens drawn only to score a prompt are not counted."""
        scores_only = self.request.max_tokens == 0
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=0 if scores_only else sum(c.num_tokens for c in self.choices),
            cached_tokens=self._cached_tokens,
        )

    def take(
        self,
        outputs: Sequence[tuple[int, worker_pb2.ChoiceOutput]],
        replies: Replies,
        clock: RequestClock,
    ) -> list[tuple[int, TextDelta]]:
        """Add outputs, each with its prompt's index: (choice, what is new) for those with news.

        Raises ApiError when its deadline passed.
        """
        news = []
        counts: dict[int, int] = {}
        for index, output in outputs:
            taken = self._take(index, output, replies)
            if taken is not None:
                news.append(taken)
                choice, delta = taken
                counts[choice] = counts.get(choice, 0) + delta.num_tokens
        for choice, count in counts.items():
            clock.tokens(choice, count)
        return news

    def _take(
        self, index: int, output: worker_pb2.ChoiceOutput, replies: Replies
    ) -> tuple[int, TextDelta] | None:
        choice = index * self.n + output.choice
        text = self.choices[choice]
        # ended by a stop string, and these were on their way
        if text.finish_reason is not None:
            return None
        if output.HasField("admission"):
            here, there = output.admission, output.admission.remote
            self._cached_tokens += max(here.cached_tokens, there.cached_tokens)
            self.prompt_scores[index] = output.prompt_logprobs
        end = _end(output)
        delta = text.push(output.token_ids, output.logprobs, end)
        if delta.finish_reason == "deadline":
            raise ApiError("deadline_exceeded", "The request took longer than it was allowed to.")
        if delta.finish_reason is not None:
            self._open -= 1
            if end is None:  # a stop string, which the engine does not know of
                self._stop(index, output.choice, replies)
        return choice, delta

    def _stop(self, index: int, choice: int, replies: Replies) -> None:
        siblings = self.choices[index * self.n : (index + 1) * self.n]
        if all(sibling.finish_reason is not None for sibling in siblings):
            replies.abort(index)
        else:
            replies.abort(index, choice)


def _end(output: worker_pb2.ChoiceOutput) -> End | None:
    if output.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    stop_token_id = output.stop_token_id if output.HasField("stop_token_id") else None
    return End(_REASONS[output.finish_reason], stop_token_id)


def submit_message(request: GenerationRequest, prompt: Prompt, seed: int) -> worker_pb2.Submit:
    """The request for one prompt, as the worker gets it; identity and limits are the caller's."""
    return worker_pb2.Submit(
        prompt_token_ids=prompt.token_ids,
        sampling=_sampling(request.params, max(prompt.max_tokens, 1), seed),
        priority=request.priority,
    )


def _sampling(params: SamplingParams, max_tokens: int, seed: int) -> common_pb2.Sampling:
    message = common_pb2.Sampling(
        n=params.n,
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        temperature=0.0 if params.is_greedy else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=seed % 2**64,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids or (),
        bad_words=[common_pb2.TokenIds(ids=ids) for ids in params.bad_words_ids],
    )
    if params.logprobs is not None:
        message.logprobs = params.logprobs
    if params.prompt_logprobs is not None:
        message.prompt_logprobs = params.prompt_logprobs
    return message
