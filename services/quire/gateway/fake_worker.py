"""A worker without an engine, for tests: answers with scripted tokens, in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from quire.gateway.replies import Replies
from quire.gateway.worker import failure_error
from quire.proto import common_pb2, worker_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    Script: TypeAlias = Callable[
        [worker_pb2.Submit], AsyncIterator[worker_pb2.ChoiceOutput | worker_pb2.Failure]
    ]
    """What a worker answers to a request."""

MAX_BACKLOG = 1024


def speak(token_ids: Sequence[int], *, delay_s: float = 0.0, stop_id: int | None = None) -> Script:
    """A script: every choice gets these tokens one by one, up to max_tokens, then `stop_id`."""

    async def script(
        submit: worker_pb2.Submit,
    ) -> AsyncIterator[worker_pb2.ChoiceOutput | worker_pb2.Failure]:
        tokens = [*token_ids, *([] if stop_id is None else [stop_id])]
        limit = submit.sampling.max_tokens
        for position, token_id in enumerate(tokens[:limit]):
            await asyncio.sleep(delay_s)
            for choice in range(max(submit.sampling.n, 1)):
                output = worker_pb2.ChoiceOutput(
                    attempt=submit.attempt, choice=choice, position=position, token_ids=[token_id]
                )
                _score(output, submit)
                if position == 0:
                    output.admission.cached_tokens = 0
                    _score_prompt(output, submit)
                if token_id == stop_id:
                    output.finish_reason = common_pb2.FINISH_REASON_STOP
                    output.stop_token_id = token_id
                elif position + 1 in (limit, len(tokens)):
                    output.finish_reason = common_pb2.FINISH_REASON_LENGTH
                yield output

    return script


def _score(output: worker_pb2.ChoiceOutput, submit: worker_pb2.Submit) -> None:
    if submit.sampling.HasField("logprobs"):
        score = output.logprobs.add(logprob=-0.5, rank=1)
        score.top_ids.extend(range(submit.sampling.logprobs))
        score.top_logprobs.extend(-1.0 - i for i in range(submit.sampling.logprobs))


def _score_prompt(output: worker_pb2.ChoiceOutput, submit: worker_pb2.Submit) -> None:
    if submit.sampling.HasField("prompt_logprobs"):
        for i in range(len(submit.prompt_token_ids) - 1):
            output.prompt_logprobs.add(logprob=-0.1 * (i + 1), rank=1)


class FakeWorker:
    """Implements `quire.gateway.worker.Worker`. Ready at once."""

    def __init__(self, model: worker_pb2.ModelInfo, script: Script) -> None:
        self.model: worker_pb2.ModelInfo | None = model
        self.ready = True
        self.startup = worker_pb2.Startup(phase="ready")
        self.load = worker_pb2.Load()
        self.script = script
        self.submitted: list[worker_pb2.Submit] = []
        self.aborted: list[int] = []
        """Request numbers."""
        self._next_number = 1
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Nothing to keep; ends what is running when cancelled."""
        try:
            await asyncio.Event().wait()
        finally:
            for task in self._tasks.values():
                task.cancel()

    async def wait_ready(self) -> worker_pb2.ModelInfo:
        """At once, if it is ready at all."""
        if self.model is None or not self.ready:
            await asyncio.Event().wait()
        return self.model or worker_pb2.ModelInfo()

    async def wait_lost(self) -> None:
        """Never."""
        await asyncio.Event().wait()

    def submit(self, submits: Sequence[worker_pb2.Submit]) -> Replies:
        """Play the script for each request."""
        first = self._next_number
        self._next_number += len(submits)
        replies = Replies(len(submits), MAX_BACKLOG, lambda i: self._abort(first + i))
        for index, submit in enumerate(submits):
            submit.request = first + index
            self.submitted.append(submit)
            task = asyncio.create_task(self._play(submit, index, replies))
            self._tasks[submit.request] = task
        return replies

    async def collect_metrics(self) -> str:
        """One sample of an engine's page."""
        return "# TYPE quire_fake gauge\nquire_fake 1.0\n"

    async def _play(self, submit: worker_pb2.Submit, index: int, replies: Replies) -> None:
        async for reply in self.script(submit):
            if isinstance(reply, worker_pb2.Failure):
                replies.finish(index)
                replies.fail(failure_error(reply))
                return
            reply.request = submit.request
            replies.deliver(index, reply)
        replies.finish(index)

    def _abort(self, number: int) -> None:
        self.aborted.append(number)
        self._tasks[number].cancel()
