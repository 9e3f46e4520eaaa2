"""Endpoints beside generation: models, tokenizer, facts, metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from quire import __version__
from quire.api.errors import ApiError, echo
from quire.api.openai import model_card
from quire.gateway.chat_request import parse_conversation
from quire.gateway.fields import Fields, integer, missing
from quire.gateway.json_body import read_json
from quire.gateway.prompts import INLINE_CHARS, encode
from quire.gateway.scope import tenant_of
from quire.telemetry import metrics as m
from quire.telemetry.instruments import CONTENT_TYPE, render

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from prometheus_client.registry import CollectorRegistry
    from starlette.requests import Request

    from quire.gateway.pipeline import Parts
    from quire.gateway.served_model import ServedModel
    from quire.text.chat_template import ChatRequest

    T = TypeVar("T")

MAX_IDS = 1 << 20


class ModelRoutes:
    """/v1/models."""

    def __init__(self, parts: Parts) -> None:
        self._models = parts.models

    async def list(self, request: Request) -> Response:
        """GET /v1/models."""
        served = self._models.require()
        return JSONResponse({"object": "list", "data": [_card(served, n) for n in served.names]})

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/models/{name}; names may have slashes."""
        served = self._models.require()
        return JSONResponse(_card(served, served.name_for(request.path_params["name"])))


def _card(served: ServedModel, name: str) -> dict[str, Any]:
    return model_card(name, created=served.created, max_model_len=served.info.max_model_len)


class TraceRoute:
    """/v1/requests/{id}/trace."""

    def __init__(self, parts: Parts) -> None:
        self._traces = parts.traces

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/requests/{id}/trace: for whoever made the request, while it is kept."""
        wanted = request.path_params["id"]
        trace = self._traces.find(wanted, tenant_of(request.scope))
        if trace is None:
            message = f"No request {echo(wanted)} of yours is known here, or no longer."
            raise ApiError("request_not_found", message)
        return JSONResponse(await trace.body())


class TokenRoutes:
    """/tokenize and /detokenize, as in vLLM."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: {"prompt"} or {"messages"} -> token ids."""
        served, fields = await self._read(request)
        source: str | ChatRequest
        if fields.has("messages"):
            source = parse_conversation(fields, served.template_variables)
            size = sum(map(len, source.texts()))
        else:
            prompt = fields.string("prompt")
            if prompt is None:
                raise missing("prompt")
            source, size = prompt, len(prompt)
        add_special = fields.boolean("add_special_tokens", default=True)
        with_texts = fields.boolean("return_token_strs")

        def ids_of() -> list[int]:
            if isinstance(source, str):
                return served.tokenizer.encode(source, add_special_tokens=add_special)
            return encode(served.tokenizer, source)

        ids = await self._run(ids_of, size)
        texts = [served.tokenizer.token_text(i) for i in ids] if with_texts else None
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": served.info.max_model_len,
                "tokens": ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: {"tokens"} -> text."""
        served, fields = await self._read(request)
        values = fields.array("tokens", max_length=MAX_IDS)
        if values is None:
            raise missing("tokens")
        ids = [integer(f"tokens[{i}]", value) for i, value in enumerate(values)]
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < served.info.vocab_size:
                message = f"'tokens[{i}]' is not a token; there are {served.info.vocab_size}."
                raise ApiError("invalid_value", message, f"tokens[{i}]")
        prompt = await self._run(
            lambda: served.tokenizer.decode(ids, skip_special_tokens=False), len(ids)
        )
        return JSONResponse({"prompt": prompt})

    async def _read(self, request: Request) -> tuple[ServedModel, Fields]:
        served = self._parts.models.require()
        limit = self._parts.config.max_body_bytes
        fields = Fields(await read_json(request.scope, request.receive, limit))
        served.name_for(fields.string("model"))
        return served, fields

    async def _run(self, work: Callable[[], T], size: int) -> T:
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._parts.threads, work)


class Facts:
    """/version, /load and /metrics."""

    def __init__(self, parts: Parts, registry: CollectorRegistry, *, with_workers: bool) -> None:
        self._with_workers = with_workers
        self._workers = parts.workers
        self._admission = parts.admission
        self._registry = registry
        self._worker_up = parts.traffic.instruments.get(m.WORKER_UP)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": __version__})

    async def load(self, request: Request) -> Response:
        """GET /load: requests in progress here, and the worker's last report."""
        load = self._workers.load
        return JSONResponse(
            {
                "server_load": self._admission.open,
                "running": load.running,
                "waiting": load.waiting,
                "queued_tokens": load.queued_tokens,
                "blocks": {
                    "free": load.blocks_free,
                    "cached": load.blocks_cached,
                    "owned": load.blocks_owned,
                },
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: the gateway's page, then those of workers that nobody else scrapes."""
        self._worker_up.set(self._workers.num_ready)
        self._workers.placement.show()
        page = render(self._registry)
        if self._with_workers:
            page += await self._workers.collect_metrics()
        return Response(page, media_type=CONTENT_TYPE)


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: not with a model that generates."""
    message = "'model' is not supported: it generates text and has no embeddings."
    raise ApiError("unsupported_parameter", message, "model")
