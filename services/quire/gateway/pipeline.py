"""The story of a generation request, in order.

    read       body, bounded in size and time                      413, 408, 400
    parse      strict JSON, every field checked and named          400, 404 for another model
    admit      a place among the requests in progress              503 + Retry-After
    tokenize   template and tokenizer, long prompts in threads     400 context_length_exceeded
    submit     one request per prompt to a worker, whose answers come back together
    stream     tokens -> text -> events as they arrive, or one body at the end
    end        whatever happened: what a worker still does for it is aborted

A worker that is lost meanwhile is not part of this story: `continuation` goes on with another.

A client that hangs up is noticed at any point after `read`, streaming or not. Before the first
byte an error is an HTTP status; after it, an error event and the end of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from quire.api.errors import echo
from quire.api.openai import Head
from quire.api.sampling import check_token_ids, new_seed
from quire.gateway.answers import Answer, ChatAnswer, CompletionAnswer, collect
from quire.gateway.cache_salt import request_salt
from quire.gateway.chat_request import parse_chat
from quire.gateway.completion_request import parse_completion
from quire.gateway.fields import Fields
from quire.gateway.generation import Generation, submit_message
from quire.gateway.json_body import read_json
from quire.gateway.json_response import send_json
from quire.gateway.prompts import encode_prompts
from quire.gateway.replies import ClientGone
from quire.gateway.scope import MAX_HEADER, connection_abort, tenant_of, timeout_of
from quire.gateway.stream import EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Executor

    from starlette.types import Message, Receive, Scope, Send

    from quire.config.gateway import GatewayConfig
    from quire.gateway.admission import Admission
    from quire.gateway.pacemaker import Pacemaker
    from quire.gateway.prompts import Prompt
    from quire.gateway.replies import Replies
    from quire.gateway.request import GenerationRequest
    from quire.gateway.served_model import ModelLoader, ServedModel
    from quire.gateway.trace import Trace, Traces
    from quire.gateway.traffic import Traffic
    from quire.gateway.workers import Workers
    from quire.proto.worker_pb2 import Submit

logger = logging.getLogger(__name__)

MAX_LOGGED_KEYS = 1000
"""Unknown field names remembered, so that each is logged once."""


@dataclass(frozen=True)
class Parts:
    """What a request passes through."""

    config: GatewayConfig
    workers: Workers
    models: ModelLoader
    admission: Admission
    pacemaker: Pacemaker
    traffic: Traffic
    threads: Executor
    traces: Traces


class Pipeline:
    """Serves both generation APIs."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._logged_keys: set[str] = set()

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        await self._serve(_Chat(self._parts.config.response_role), scope, receive, send)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        await self._serve(_Completions(), scope, receive, send)

    async def _serve(self, api: _Api, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        with self._parts.traces.follow(state["request_id"], tenant_of(scope)) as trace:
            await self._answer(api, _Call(scope, receive, send, trace))

    async def _answer(self, api: _Api, call: _Call) -> None:
        parts, trace = self._parts, call.trace
        clock = parts.traffic.start(trace)
        served = parts.models.require()
        body = await read_json(call.scope, call.receive, parts.config.max_body_bytes)
        trace.watch.lap("read")
        fields = Fields(body)
        name = served.name_for(fields.string("model"))
        request = _with_token_ids(api.parse(fields, served), served)
        send = self._naming_ignored(request.ignored, call.send)
        trace.watch.lap("parse")
        with parts.admission.enter(), clock.in_flight():
            prompts = await encode_prompts(request, served, parts.threads)
            clock.tokenized(sum(len(prompt.token_ids) for prompt in prompts))
            submits = _submits(request, prompts, call.scope, parts.config)
            generation = Generation(request, prompts, served.tokenizer, submits)
            head = Head(api.prefix + secrets.token_hex(16), int(time.time()), name)
            answer = api.answer(head, generation)
            parts.traces.name(trace, head.id)
            trace.describe(name, request.delivery.stream, generation)
            trace.watch.lap("tokenize")
            if generation.needs_no_worker:
                await send_json(send, 200, answer.body([[] for _ in generation.choices]))
                return
            async with self._submitted(call, generation) as replies:
                if request.delivery.stream:
                    stream = EventStream(generation, answer, send, clock)
                    with clock.streaming(), parts.pacemaker.follow(replies, stream):
                        await stream.run(replies)
                else:
                    body = await collect(generation, answer, clock, replies)
                    await send_json(send, 200, body)

    @contextlib.asynccontextmanager
    async def _submitted(self, call: _Call, generation: Generation) -> AsyncIterator[Replies]:
        """The workers' replies, until the client hangs up; what is left then is aborted."""
        scope, receive = call.scope, call.receive
        async with self._parts.workers.submit(generation.submits, call.trace) as replies:
            replies.on_overflow = connection_abort(scope)
            listening = asyncio.create_task(_until_gone(receive, replies))
            try:
                yield replies
            except ClientGone:
                self._parts.traffic.disconnected()
                raise
            finally:
                listening.cancel()

    def _naming_ignored(self, ignored: tuple[str, ...], send: Send) -> Send:
        """Tell the client, in a header, which of its fields mean nothing here."""
        if not ignored:
            return send
        for key in ignored:
            if key not in self._logged_keys and len(self._logged_keys) < MAX_LOGGED_KEYS:
                self._logged_keys.add(key)
                logger.warning("request field %s is unknown and ignored", echo(key))
        names = ", ".join(key for key in ignored if key.isidentifier() and key.isascii())
        header = (b"x-ignored-params", names[:MAX_HEADER].encode())

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        return send_named


@dataclass(frozen=True)
class _Call:
    """One HTTP request."""

    scope: Scope
    receive: Receive
    send: Send
    trace: Trace


class _Api(Protocol):
    """What differs between the two APIs."""

    prefix: str

    def parse(self, fields: Fields, served: ServedModel) -> GenerationRequest: ...

    def answer(self, head: Head, generation: Generation) -> Answer: ...


class _Chat:
    prefix = "chatcmpl-"

    def __init__(self, role: str) -> None:
        self._role = role

    def parse(self, fields: Fields, served: ServedModel) -> GenerationRequest:
        return parse_chat(fields, served.defaults, served.template_variables)

    def answer(self, head: Head, generation: Generation) -> Answer:
        return ChatAnswer(head, generation, self._role)


class _Completions:
    prefix = "cmpl-"

    def parse(self, fields: Fields, served: ServedModel) -> GenerationRequest:
        return parse_completion(fields, served.defaults, served.info.vocab_size)

    def answer(self, head: Head, generation: Generation) -> Answer:
        return CompletionAnswer(head, generation)


def _with_token_ids(request: GenerationRequest, served: ServedModel) -> GenerationRequest:
    """The request with bad words as token ids. Raises ApiError for ids outside the vocabulary."""
    params = request.params
    if params.bad_words:
        ids = served.tokenizer.bad_words_ids(params.bad_words)
        request = replace(request, params=replace(params, bad_words_ids=ids))
    check_token_ids(request.params, served.info.vocab_size)
    return request


def _submits(
    request: GenerationRequest, prompts: list[Prompt], scope: Scope, config: GatewayConfig
) -> list[Submit]:
    params = request.params
    timeout_s = timeout_of(scope, config.request_timeout)
    submits = []
    for i, prompt in enumerate(prompts):
        # prompts that are alike must not draw alike, unless the client chose the seed
        submit = submit_message(
            request, prompt, params.seed if params.seed is not None else new_seed()
        )
        submit.request_id = f"{scope['state']['request_id']}-{i}"[:MAX_HEADER]
        submit.cache_salt = request_salt(tenant_of(scope), request.cache_salt)
        if timeout_s:
            submit.timeout_ms = max(1, round(timeout_s * 1000))
        submits.append(submit)
    return submits


async def _until_gone(receive: Receive, replies: Replies) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    replies.fail(ClientGone())
