"""The server under load: where its requests go, and how they look there."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.cli.bench.client import Client, Endpoint
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from quire.cli.bench.options import TargetConfig

Prompt = "str | Sequence[int] | Sequence[Mapping[str, str]]"
"""Text, token ids, or the messages of a chat."""

POLL_S = 0.2


class NotReadyError(Exception):
    """The server does not answer as it should; the message says how."""


@dataclass(frozen=True)
class Target:
    """A server that has answered, and the model that it is asked for."""

    client: Client
    path: str
    model: str
    is_chat: bool
    fields: Mapping[str, Any]
    """Of every request: temperature, and what the user added."""

    def body(self, prompt: Any, output_len: int, ignore_eos: bool) -> bytes:
        """A streaming request. Raises ConfigError when a chat gets token ids."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            fields["ignore_eos"] = True
        if not self.is_chat:
            fields["prompt"] = prompt
        elif isinstance(prompt, str):
            fields["messages"] = [{"role": "user", "content": prompt}]
        elif prompt and isinstance(prompt[0], int):
            raise ConfigError("the dataset is token ids, which a chat cannot be: --backend openai")
        else:
            fields["messages"] = prompt
        return json.dumps({**fields, **self.fields}, separators=(",", ":")).encode()

    async def warm_up(self, body: bytes, count: int) -> None:
        """Send a request some times. Raises NotReadyError when it is refused."""
        for _ in range(count):
            outcome = await self.client.stream(self.path, body)
            if not outcome.ok:
                raise NotReadyError(f"{self.client.endpoint.url}{self.path}: {outcome.error}")


@asynccontextmanager
async def open_target(config: TargetConfig) -> AsyncIterator[Target]:
    """Connect, and find the model unless it is named. Raises ConfigError, NotReadyError."""
    fields = {"temperature": config.temperature} | _extra_body(config)
    key = config.api_key or os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(config.url, {"Authorization": f"Bearer {key}"} if key else {})
    path = config.endpoint or ("/v1/chat/completions" if config.is_chat else "/v1/completions")
    async with Client(endpoint, config.request_timeout_sec) as client:
        model = config.model or await _wait_for_model(client, config.ready_check_timeout_sec)
        yield Target(client, path, model, config.is_chat, fields)


async def _wait_for_model(client: Client, patience_s: float) -> str:
    """The first model the server lists, once it answers. Raises NotReadyError."""
    deadline = time.monotonic() + patience_s
    problem = "no answer"
    while True:
        try:
            status, body = await client.get("/v1/models")
            if status == 200:
                return str(json.loads(body)["data"][0]["id"])
            problem = f"HTTP {status}: {body[:200].decode(errors='replace')}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError):
            raise NotReadyError(
                f"{client.endpoint.url}/v1/models is not a list of models"
            ) from None
        if time.monotonic() > deadline:
            raise NotReadyError(f"{client.endpoint.url} is not ready: {problem}")
        await asyncio.sleep(POLL_S)


def _extra_body(config: TargetConfig) -> dict[str, Any]:
    if config.extra_body is None:
        return {}
    try:
        extra = json.loads(config.extra_body)
    except json.JSONDecodeError as error:
        raise ConfigError(f"extra_body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError("extra_body must be a JSON object")
    return extra
