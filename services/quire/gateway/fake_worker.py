"""A worker without an engine, for tests: answers with scripted tokens, in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from quire.gateway.worker import Loss
from quire.proto import common_pb2, worker_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from quire.gateway.worker import Receiver

    Script: TypeAlias = Callable[
        [worker_pb2.Submit], AsyncIterator[worker_pb2.ChoiceOutput | worker_pb2.Failure]
    ]
    """What a worker answers to a request."""


def speak(token_ids: Sequence[int], *, delay_s: float = 0.0, stop_id: int | None = None) -> Script:
    """A script: every choice gets these tokens one by one, up to max_tokens, then `stop_id`.

    A resumed choice gets those behind the ones it has.
    """

    async def script(
        submit: worker_pb2.Submit,
    ) -> AsyncIterator[worker_pb2.ChoiceOutput | worker_pb2.Failure]:
        tokens = [*token_ids, *([] if stop_id is None else [stop_id])]
        limit = submit.sampling.max_tokens
        done = {entry.choice: len(entry.token_ids) for entry in submit.resumed}
        done = done or dict.fromkeys(range(max(submit.sampling.n, 1)), 0)
        first = min(done.values())
        for position, token_id in enumerate(tokens[:limit][first:], start=first):
            await asyncio.sleep(delay_s)
            for choice in (c for c, count in done.items() if count <= position):
                output = worker_pb2.ChoiceOutput(
                    attempt=submit.attempt, choice=choice, position=position, token_ids=[token_id]
                )
                _score(output, submit)
                if position == first:
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
    """Implements `quire.gateway.worker.Worker`. Ready until `stop`, and from `start` on."""

    def __init__(self, model: worker_pb2.ModelInfo, script: Script, *, name: str = "0") -> None:
        self.name = name
        self.address = f"fake:{name}"
        self.on_change: Callable[[], None] = lambda: None
        self.model: worker_pb2.ModelInfo | None = model
        self.ready = True
        self.startup = worker_pb2.Startup(phase="ready")
        self.load = worker_pb2.Load()
        self.script = script
        self.submitted: list[worker_pb2.Submit] = []
        self.refusal = ""
        """Of commands."""
        self.aborted: list[int] = []
        """Request numbers."""
        self.aborted_choices: list[tuple[int, int]] = []
        """Request numbers, and the choice."""
        self._next_number = 1
        self._receivers: dict[int, Receiver] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        """Requests being played."""
        return len(self._receivers)

    async def run(self) -> None:
        """Nothing to keep; ends what is running when cancelled."""
        try:
            await asyncio.Event().wait()
        finally:
            for task in self._tasks.values():
                task.cancel()

    def stop(self, loss: Loss = Loss.LOST) -> None:
        """The worker is gone, and the requests it had are lost."""
        self.ready = False
        self.on_change()
        self.release(loss)

    def start(self) -> None:
        """The worker is there again."""
        self.ready = True
        self.on_change()

    def submit(self, submit: worker_pb2.Submit, receiver: Receiver) -> None:
        """Play the script for a request."""
        submit.request = self._next_number
        self._next_number += 1
        self.submitted.append(submit)
        self._receivers[submit.request] = receiver
        self._tasks[submit.request] = asyncio.create_task(self._play(submit, receiver))

    def abort(self, number: int, choice: int | None = None) -> None:
        """Note it, and stop playing if it is the whole request."""
        if number not in self._receivers:
            return
        if choice is not None:
            self.aborted_choices.append((number, choice))
            return
        self.aborted.append(number)
        self._forget(number)

    def release(self, loss: Loss) -> None:
        """Lose every request."""
        for number, receiver in list(self._receivers.items()):
            self._forget(number)
            receiver.lose(loss)

    async def control(
        self, request: worker_pb2.ControlRequest, timeout_s: float
    ) -> worker_pb2.ControlReply:
        """Sleeps and wakes; `refusal` is what it says instead."""
        if self.refusal:
            return worker_pb2.ControlReply(message=self.refusal)
        command = request.WhichOneof("command")
        if command in ("sleep", "wake"):
            self.load.sleeping = command == "sleep"
        health = worker_pb2.HealthReport(sleeping=self.load.sleeping)
        return worker_pb2.ControlReply(ok=True, health=health)

    async def collect_metrics(self) -> str:
        """One sample of an engine's page."""
        return "# TYPE quire_fake gauge\nquire_fake 1.0\n"

    async def _play(self, submit: worker_pb2.Submit, receiver: Receiver) -> None:
        async for reply in self.script(submit):
            if isinstance(reply, worker_pb2.Failure):
                del self._receivers[submit.request]
                receiver.refuse(reply)
                return
            reply.request = submit.request
            receiver.deliver(reply)
        self._receivers.pop(submit.request, None)

    def _forget(self, number: int) -> None:
        del self._receivers[number]
        task = self._tasks.pop(number)
        if task is not asyncio.current_task():  # a script may end its own worker
            task.cancel()
