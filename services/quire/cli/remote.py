"""Talking to a running server: shared by `quire chat` and `quire complete`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quire.config.base import check_fields
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2

FAILED = 1
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """Which server and model to talk to."""

    url: str | None = option(None, "server", aliases=("base_url",))
    """URL of the API; the variable OPENAI_BASE_URL or http://127.0.0.1:8000/v1 by default."""
    model_name: str | None = option(None, "server", aliases=("model",))
    """Model to ask; the first that the server lists by default."""
    api_key: str | None = option(None, "server", secret=True)
    """Bearer token; the variable OPENAI_API_KEY by default."""
    max_tokens: int | None = option(None, "sampling")
    """Most tokens of an answer."""
    temperature: float | None = option(None, "sampling")
    """Sampling temperature; the server's default when not given."""
    top_p: float | None = option(None, "sampling")
    """Nucleus sampling; the server's default when not given."""
    seed: int | None = option(None, "sampling")
    """Makes the answer reproducible."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def base_url(self) -> str:
        """Without a slash at its end."""
        url = self.url or os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1"
        return url.rstrip("/")

    def sampling(self) -> dict[str, Any]:
        """The request fields that were given."""
        names = ("max_tokens", "temperature", "top_p", "seed")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


class RemoteError(Exception):
    """The server could not be reached or refused; the message is for the person at the keyboard."""


class Remote:
    """One server and model. Use as a context manager. Methods raise RemoteError."""

    def __init__(self, config: RemoteConfig) -> None:
        import httpx2

        self._config = config
        key = config.api_key or os.environ.get("OPENAI_API_KEY")
        local = urlsplit(config.base_url).hostname in LOCAL_HOSTS
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(10.0, read=None),
            trust_env=not local,  # a proxy does not lead to this machine
        )
        self._errors = (httpx2.HTTPError, httpx2.InvalidURL)
        self._model = config.model_name

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        """The model to ask, looked up once."""
        if self._model is None:
            try:
                answer = self._client.get(f"{self._config.base_url}/models")
                self._check(answer)
                self._model = str(answer.json()["data"][0]["id"])
            except self._errors as error:
                raise self._unreachable(error) from None
            except (ValueError, KeyError, IndexError, TypeError):
                raise RemoteError(f"{self._config.base_url}/models lists no model") from None
        return self._model

    def stream_chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of the answer to a conversation, as they come."""
        yield from self._stream(
            "/chat/completions", {"messages": messages}, lambda c: c["delta"].get("content") or ""
        )

    def stream_completion(self, prompt: str) -> Iterator[str]:
        """Pieces of the text that goes on after a prompt, as they come."""
        yield from self._stream(
            "/completions", {"prompt": prompt}, lambda choice: choice.get("text") or ""
        )

    def _stream(
        self, path: str, fields: dict[str, Any], text_of: Callable[[dict[str, Any]], str]
    ) -> Iterator[str]:
        body = {"model": self.model, "stream": True, **self._config.sampling(), **fields}
        try:
            with self._client.stream("POST", self._config.base_url + path, json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                self._check(answer)
                for line in answer.iter_lines():
                    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                        continue
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise RemoteError(_message(event))
                    for choice in event["choices"]:
                        yield text_of(choice)
        except self._errors as error:
            raise self._unreachable(error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"the server sent something unexpected: {error!r}") from None

    def _check(self, answer: httpx2.Response) -> None:
        if answer.status_code != 200:
            try:
                text = _message(answer.json())
            except ValueError:
                text = answer.text[:200]
            raise RemoteError(f"HTTP {answer.status_code}: {text}")

    def _unreachable(self, error: Exception) -> RemoteError:
        return RemoteError(
            f"{self._config.base_url}: {error}; is the server running? (quire serve)"
        )


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def fail(prog: str, error: Exception) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    print(f"{prog}: error: {error}", file=sys.stderr)
    return FAILED


def show(pieces: Iterator[str]) -> str:
    """Print pieces as they come; returns the whole text.

    Ctrl-C ends the answer, not the program: what came until then is returned.
    """
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return "".join(said)
