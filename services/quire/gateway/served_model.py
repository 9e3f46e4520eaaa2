"""The model this gateway serves: its names, its facts from the workers, its tokenizer."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.api.errors import ApiError, echo
from quire.text.folder import resolve_folder, sampling_defaults
from quire.text.hub import HubUnreachable
from quire.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from quire.config.gateway import GatewayConfig, TokenizerConfig
    from quire.gateway.workers import Workers
    from quire.proto.worker_pb2 import ModelInfo

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
"""Between two attempts to have the tokenizer from a hub that does not give it now."""


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can be made for."""

    names: tuple[str, ...]
    """What clients call it; the first is shown in answers to requests without a model."""
    info: ModelInfo
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    """Sampling parameters where a request gives none."""
    created: int
    """Unix time, seconds."""

    def name_for(self, asked: str | None) -> str:
        """The name to answer under. Raises ApiError when the model is not served."""
        if asked is None:
            return self.names[0]
        if asked in self.names:
            return asked
        message = (
            f"The model {_shown(asked)} does not exist or you do not have access to it. "
            f"Served here: {', '.join(self.names)}."
        )
        raise ApiError("model_not_found", message, "model")

    @property
    def template_variables(self) -> frozenset[str]:
        """What `chat_template_kwargs` may set."""
        chat = self.tokenizer.chat
        return chat.variables - set(self.tokenizer.special_tokens) if chat else frozenset()


class ModelLoader:
    """Keeps `served` in step with what the workers serve. `run` must be running."""

    def __init__(self, config: GatewayConfig, source: TokenizerConfig, workers: Workers) -> None:
        self._config = config
        self._source = source
        self._workers = workers
        self._served: ServedModel | None = None
        self.failure: str | None = None
        """Why the model cannot be served: no tokenizer, or a template that does not compile."""

    @property
    def served(self) -> ServedModel | None:
        """The model, None while it is not ready or every worker is away."""
        return self._served if self._workers.ready else None

    def require(self) -> ServedModel:
        """The model. Raises ApiError not_ready."""
        served = self.served
        if served is None:
            if self.failure is not None:
                raise ApiError("not_ready", "The model cannot be served; see the server's log.")
            phase = self._workers.startup.phase or "start"
            message = f"The model is not ready yet (phase: {phase}). Please retry."
            raise ApiError("not_ready", message, retry_after_s=RETRY_AFTER_S)
        return served

    async def run(self) -> None:
        """Load the tokenizer when a worker has loaded its model, and again if that changes.

        Returns, with `failure` set, when it cannot be loaded.
        """
        try:
            await self._keep_loaded()
        except (OSError, ValueError) as error:
            self.failure = f"no tokenizer: {error}"
            logger.critical("the model cannot be served: %s", self.failure)

    async def _keep_loaded(self) -> None:
        # beside the engine, which takes longer; a failure shows when the model is known
        own = self._source.tokenizer
        early = asyncio.create_task(self._fetch(own)) if own else None
        try:
            while True:
                info = await self._workers.wait_ready()
                known = self._served
                if known is None or known.info.model != info.model:
                    loading = early or self._fetch(info.model)
                    self._served = self._serve(info, await loading)
                elif known.info != info:  # restarted
                    self._served = self._serve(info, known.tokenizer)
                await self._workers.wait_lost()
        finally:
            if early is not None:
                early.cancel()

    async def _fetch(self, source: str) -> Tokenizer:
        """The tokenizer, however often the hub must be asked. Raises OSError, ValueError."""
        delay = FIRST_DELAY_S
        while True:
            try:
                return await asyncio.to_thread(self._load, source)
            except HubUnreachable as error:
                logger.warning("%s; trying again in %g s", error, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    def _load(self, source: str) -> Tokenizer:
        began = time.monotonic()
        folder = resolve_folder(source, self._source.revision)
        tokenizer = Tokenizer(folder, chat_template=self._config.chat_template)
        tokenizer.detokenizer()  # its table, so that the first request need not wait for it
        logger.info("tokenizer of %s loaded in %.1f s", source, time.monotonic() - began)
        return tokenizer

    def _serve(self, info: ModelInfo, tokenizer: Tokenizer) -> ServedModel:
        defaults = sampling_defaults(tokenizer.folder)
        names = self._config.served_model_name or (info.model,)
        return ServedModel(tuple(names), info, tokenizer, defaults, int(time.time()))


def _shown(name: str) -> str:
    return "`" + echo(name)[1:-1] + "`"
