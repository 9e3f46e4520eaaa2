"""One request's timeline: the parts of its time to first token, its attempts, its routing.

    received ─read─parse─tokenize─▶ submitted, per prompt:
        wait ─ route ─ (lost ─ wait ─ route)* ─ network ─ what the worker reports ─▶ first output
    ─ stream ─▶ the first token's bytes are with the client's connection

The parts follow each other without a gap, so they sum to the time to first token. Durations alone
cross the wire, never times of another machine's clock: `network` is what is left of the time
between sending and hearing when the worker's own durations are taken away, both ways together.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.api.errors import ApiError
from quire.gateway.replies import ClientGone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.api.openai import Usage
    from quire.gateway.generation import Generation
    from quire.gateway.placement import Decided, Place
    from quire.proto.worker_pb2 import Admission, RemotePrefill

MAX_TRACES = 1024
"""Latest requests whose timelines are kept."""
MAX_ATTEMPTS = 32
"""Of a prompt that are kept; the first ones."""


@dataclass(frozen=True)
class Part:
    """A stretch of time that begins where the one before ended."""

    name: str
    seconds: float


class Stopwatch:
    """Consecutive parts of a stretch of time."""

    def __init__(self, began: float) -> None:
        self.began = self.last = began
        """time.monotonic()"""
        self.parts: list[Part] = []

    def lap(self, name: str) -> float:
        """The part since the last one is over; returns its seconds."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.parts.append(Part(name, seconds))
        return seconds

    def lap_in(self, inner: list[Part], rest: str) -> None:
        """The same, known in more detail; what the details do not cover comes first, as `rest`."""
        whole = self.lap(rest)
        covered = sum(part.seconds for part in inner)
        self.parts[-1:] = [Part(rest, max(whole - covered, 0.0)), *inner]


@dataclass
class Attempt:
    """One worker that the prompt was sent to."""

    number: int
    place: Place
    num_tokens: int
    """Output tokens that were there before."""
    sent: float = field(default_factory=time.monotonic)
    lost: str | None = None
    """Why it was not the last attempt."""
    seconds: float | None = None
    """With this worker; None while it still is."""

    def end(self, lost: str | None) -> None:
        """It is over; `lost` unless it ended as it should."""
        if self.seconds is None:
            self.lost, self.seconds = lost, time.monotonic() - self.sent

    def body(self) -> dict[str, Any]:
        """As JSON shows it."""
        place, decided = self.place, self.place.decided
        return {
            "attempt": self.number,
            "worker": place.worker.name,
            "prefill_worker": None if place.prefill is None else place.prefill.name,
            "placed_by": "least_load" if decided is None else f"router {decided.router}",
            "tokens_before": self.num_tokens,
            "seconds": self.seconds,
            "lost": self.lost,
        }


class PromptTrace:
    """One prompt on its way through workers. Parts are noted up to its first output."""

    def __init__(self, trace: Trace, began: float) -> None:
        self.trace = trace
        self.watch = Stopwatch(began)
        self.attempts: list[Attempt] = []
        self.admission: Admission | None = None
        """What the worker said of the time before the first token."""

    @property
    def is_open(self) -> bool:
        """No output has come yet."""
        return self.admission is None

    def lap(self, name: str) -> None:
        """A part is over, if the first output has still to come."""
        if self.is_open:
            self.watch.lap(name)

    def sent(self, number: int, place: Place, num_tokens: int) -> None:
        """The prompt goes to a worker."""
        self.lap("route")
        if len(self.attempts) < MAX_ATTEMPTS:
            self.attempts.append(Attempt(number, place, num_tokens))

    def left(self, why: str | None) -> None:
        """The worker has it no more."""
        if why is not None:
            self.lap("lost")
        if self.attempts:
            self.attempts[-1].end(why)

    def admitted(self, admission: Admission) -> None:
        """The first output came."""
        if self.is_open:
            self.watch.lap_in(_parts_of(admission), "network")
            self.admission = admission
            self.trace.first_output(self)


class Trace:
    """One HTTP request."""

    def __init__(self, request_id: str = "", owner: bytes = b"") -> None:
        self.owner = owner
        """The tenant that may see it."""
        self.ids = [request_id]
        """Under which it is found: the client's or ours, then the answer's."""
        self.created = time.time()
        self.watch = Stopwatch(time.monotonic())
        self.prompts: list[PromptTrace] = []
        self.ttft_s: float | None = None
        self.total_s: float | None = None
        self.error: str | None = None
        self._first: PromptTrace | None = None
        self._model: str | None = None
        self._stream = False
        self._usage: Usage | None = None
        self._generation: Generation | None = None

    def prompt(self) -> PromptTrace:
        """A prompt of it is submitted."""
        self.prompts.append(PromptTrace(self, self.watch.last))
        return self.prompts[-1]

    def first_output(self, prompt: PromptTrace) -> None:
        """A prompt's first output came; the first one's parts are the request's."""
        if self._first is None:
            self._first = prompt
            self.watch.parts += prompt.watch.parts
            self.watch.last = prompt.watch.last

    def first_token(self) -> None:
        """The first token is on its way to the client, or into the answer."""
        if self.ttft_s is None:
            if self._first is None and self.prompts:  # a worker that reports nothing
                self.prompts[0].lap("worker")
                self.first_output(self.prompts[0])
            self.watch.lap("stream")
            self.ttft_s = time.monotonic() - self.watch.began

    def describe(self, model: str, stream: bool, generation: Generation) -> None:
        """What is asked for; the answer's size is read from `generation` when it is shown."""
        self._model, self._stream, self._generation = model, stream, generation

    def finish(self, error: str | None) -> None:
        """The request is over."""
        self.error, self.total_s = error, time.monotonic() - self.watch.began
        for prompt in self.prompts:
            prompt.left(None)
        if self._generation is not None:
            # the numbers, not the prompts and the text
            self._usage, self._generation = self._generation.usage, None

    async def body(self) -> dict[str, Any]:
        """As JSON shows it. Asks the routers for their scores."""
        parts = self.watch.parts
        if self._first is None and self.prompts:  # not yet there: what is known so far
            parts = [*parts, *self.prompts[0].watch.parts]
        usage = self._usage if self._generation is None else self._generation.usage
        state = "running" if self.total_s is None else "failed" if self.error else "finished"
        return {
            "object": "request.trace",
            "id": self.ids[-1],
            "request_id": self.ids[0],
            "created": self.created,
            "state": state,
            "failure": self.error,
            "model": self._model,
            "stream": self._stream,
            "usage": None if usage is None else usage.body(),
            "ttft_s": self.ttft_s,
            "total_s": self.total_s,
            "parts": [{"name": part.name, "seconds": part.seconds} for part in parts],
            "prompts": [await _prompt_body(prompt) for prompt in self.prompts],
        }


class Traces:
    """The latest requests, running ones too, by their ids."""

    def __init__(self, capacity: int = MAX_TRACES) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[bytes, str], Trace] = OrderedDict()

    @contextmanager
    def follow(self, request_id: str, owner: bytes) -> Iterator[Trace]:
        """A request, from its reception to its end; it ends with what is raised."""
        trace = Trace(request_id, owner)
        self._add(request_id, trace)
        error: str | None = "internal_error"
        try:
            yield trace
            error = None
        except ApiError as raised:
            error = raised.code
            raise
        except (ClientGone, ConnectionError, asyncio.CancelledError):
            error = "client_gone"
            raise
        finally:
            trace.finish(error)

    def name(self, trace: Trace, answer_id: str) -> None:
        """The answer's id is known."""
        trace.ids.append(answer_id)
        self._add(answer_id, trace)

    def find(self, some_id: str, owner: bytes) -> Trace | None:
        """None when it is not kept, or another tenant's."""
        return self._kept.get((owner, some_id))

    def _add(self, some_id: str, trace: Trace) -> None:
        key = (trace.owner, some_id)
        self._kept.pop(key, None)
        self._kept[key] = trace
        while len(self._kept) > 2 * self._capacity:  # two ids each
            self._kept.popitem(last=False)


def _parts_of(admission: Admission) -> list[Part]:
    """What the worker reports, in order, from hearing of the request to its first output."""
    parts = [Part("inbox", admission.inbox_s), Part("queue", admission.queue_s)]
    if admission.HasField("remote"):
        parts += _remote_parts(admission.remote)
    else:
        parts.append(Part("prefill", admission.prefill_s))
    parts.append(Part("handout", admission.handout_s))
    return parts


def _remote_parts(remote: RemotePrefill) -> list[Part]:
    if remote.failed:
        return [Part("prefill_failed", remote.ask_s), Part("prefill", remote.resume_s)]
    return [
        Part("prefill_ask", remote.ask_s),
        Part("prefill_queue", remote.queue_s),
        Part("prefill", remote.prefill_s),
        Part("transfer", remote.transfer_s),
        Part("commit", remote.commit_s),
        Part("first_step", remote.resume_s),
    ]


async def _prompt_body(prompt: PromptTrace) -> dict[str, Any]:
    body: dict[str, Any] = {"attempts": [attempt.body() for attempt in prompt.attempts]}
    decided = [a.place.decided for a in prompt.attempts if a.place.decided is not None]
    body["routing"] = [await _routing_body(one) for one in decided]
    admission = prompt.admission
    if admission is not None:
        body["cached_tokens"] = admission.cached_tokens
        if admission.HasField("remote"):
            body["transfer"] = _transfer_body(admission.remote)
    return body


def _transfer_body(remote: RemotePrefill) -> dict[str, Any]:
    return {
        "prefill_worker": remote.worker,
        "failed": remote.failed,
        "cached_tokens": remote.cached_tokens,
        "chunks": [{"after_s": a.after_s, "blocks": a.blocks} for a in remote.arrivals],
    }


async def _routing_body(decided: Decided) -> dict[str, Any]:
    body: dict[str, Any] = {
        "router": decided.router,
        "expected_cached_tokens": decided.cached_tokens,
        "expected_ttft_s": decided.expected_ttft_s,
    }
    explained = await decided.explain()
    if explained is None:
        return body | {"policy": None, "scores": None}
    scores = [
        {
            "worker": score.pod,
            "eligible": score.eligible,
            "costs": {cost.name: cost.value for cost in score.costs},
            "cached_tokens": score.cached_tokens,
            "wait_s": score.wait_s,
            "prefill_tokens_per_s": score.prefill_tokens_per_s,
            "running": score.running,
            "itl_s": score.itl_s,
            "suspect": score.suspect,
        }
        for score in explained.scores
    ]
    return body | {"policy": explained.policy, "scores": scores}
