"""Commands to all workers over HTTP, under vLLM's names, for whoever has the admin key.

`quire control` says the same to one worker, without a gateway.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from quire.api.errors import ApiError
from quire.gateway.auth import check_admin
from quire.proto import worker_pb2

if TYPE_CHECKING:
    from starlette.requests import Request

    from quire.gateway.workers import Workers

ANSWER_S = 45.0
"""A worker that shall sleep waits 30 s for its requests to end."""


class AdminRoutes:
    """/sleep, /wake_up and /is_sleeping."""

    def __init__(self, workers: Workers, key: str | None) -> None:
        self._workers = workers
        self._key = key

    async def sleep(self, request: Request) -> Response:
        """POST /sleep?level=1: drop the KV caches, keep the weights, take no requests."""
        check_admin(request.scope, self._key)
        if request.query_params.get("level", "1") != "1":
            message = "Only sleep level 1 works: the KV cache is dropped, the weights stay."
            raise ApiError("invalid_value", message, "level")
        await self._tell_all(worker_pb2.ControlRequest(sleep=worker_pb2.Sleep(level=1)))
        return Response()

    async def wake_up(self, request: Request) -> Response:
        """POST /wake_up: take requests again."""
        check_admin(request.scope, self._key)
        await self._tell_all(worker_pb2.ControlRequest(wake=worker_pb2.Wake()))
        return Response()

    async def is_sleeping(self, request: Request) -> Response:
        """GET /is_sleeping: whether every worker does."""
        check_admin(request.scope, self._key)
        replies = await self._tell_all(worker_pb2.ControlRequest(health=worker_pb2.Health()))
        return JSONResponse({"is_sleeping": all(reply.health.sleeping for reply in replies)})

    async def _tell_all(self, request: worker_pb2.ControlRequest) -> list[worker_pb2.ControlReply]:
        """Raises ApiError naming the workers that refuse; the others have done it."""
        workers = self._workers.all
        replies = await asyncio.gather(*(w.control(request, ANSWER_S) for w in workers))
        answers = list(zip(workers, replies, strict=True))
        refused = [f"{worker.name}: {reply.message}" for worker, reply in answers if not reply.ok]
        if refused:
            message = f"{len(refused)} of {len(workers)} workers did not: {'; '.join(refused)}."
            raise ApiError("conflict", message)
        return replies
