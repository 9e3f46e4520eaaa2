"""Completions that stream from a release's gateway while a test does something else."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

import httpx2
from manifests import RELEASE

if TYPE_CHECKING:
    from local_pods import LocalRelease


class Stream:
    """A completion that streams in the background."""

    def __init__(self, release: LocalRelease, tokens: int, repeats: int = 12) -> None:
        self._url = release.of("gateway")[0].url("http", "/v1/completions")
        key = release.secret(f"{RELEASE}-quire-api-key", "api-key")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._body = {
            "model": "demo", "prompt": "import os\n\ndef list_files(path):\n" * repeats,
            "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True,
        }  # fmt: skip
        self.events: list[str] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Stream:
        self._thread.start()
        deadline = time.monotonic() + 60
        while len(self.events) < 5:
            assert self.error is None, self.error
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def _run(self) -> None:
        try:
            with (
                httpx2.Client(timeout=60) as client,
                client.stream("POST", self._url, json=self._body, headers=self._headers) as answer,
            ):
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
        except httpx2.HTTPError as error:
            self.error = error

    def finish(self) -> str:
        """The text. Raises AssertionError when the stream was cut off."""
        self._thread.join(120)
        assert self.error is None, self.error
        assert self.events[-1] == "[DONE]", self.events[-1]
        chunks = [json.loads(event) for event in self.events[:-1]]
        assert not any("error" in chunk for chunk in chunks)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert choices[-1]["finish_reason"] == "length"
        return "".join(choice["text"] for choice in choices)
