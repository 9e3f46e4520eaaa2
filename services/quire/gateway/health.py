"""Probes: is the process alive, has it started, may it get traffic."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from starlette.requests import Request

    from quire.gateway.served_model import ModelLoader
    from quire.gateway.workers import Workers

MAX_STEP_AGE_S = 120.0
"""An engine with work that finishes no step for this long is not healthy, whatever it says."""


class Health:
    """Endpoints without a key: they say nothing about models or requests."""

    def __init__(self, workers: Workers, models: ModelLoader) -> None:
        self._workers = workers
        self._models = models
        self._began = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Requests can be served: model known, a worker's session up, tokenizer loaded."""
        return self._models.served is not None

    async def livez(self, request: Request) -> Response:
        """This process answers; it says nothing about the engine, which it cannot restart."""
        return JSONResponse({"state": "alive"})

    async def readyz(self, request: Request) -> Response:
        """200 when requests can be served."""
        return self._answer({"state": "ready" if self.is_ready else "starting"}, self.is_ready)

    async def startupz(self, request: Request) -> Response:
        """How far the start is: 200 when over."""
        return self._answer(self.progress(), self.is_ready)

    async def health(self, request: Request) -> Response:
        """200 when requests can be served and the engine makes progress."""
        moving = self._workers.load.step_age_s < MAX_STEP_AGE_S
        return Response(status_code=200 if self.is_ready and moving else 503)

    def progress(self) -> dict[str, Any]:
        """The start-up phase, with its progress where the worker reports one."""
        startup = self._workers.startup
        waits_for_tokenizer = startup.phase == "ready" and not self.is_ready
        failure = self._models.failure
        return {
            "state": "failed" if failure else "ready" if self.is_ready else "starting",
            "phase": "tokenizer" if waits_for_tokenizer else startup.phase,
            "detail": failure or startup.detail,
            "done": startup.done,
            "total": startup.total,
            "unit": startup.unit,
            "workers": len(self._workers.all),
            "workers_ready": self._workers.num_ready,
            "elapsed_seconds": round(time.monotonic() - self._began, 3),
        }

    @staticmethod
    def _answer(body: dict[str, Any], ok: bool) -> Response:
        headers = {} if ok else {"retry-after": "2"}
        return JSONResponse(body, status_code=200 if ok else 503, headers=headers)
