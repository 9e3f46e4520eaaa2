"""Completions that stream from a release's gateway while a test does something else, and what its
pods count meanwhile."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import TYPE_CHECKING

import httpx2
from manifests import RELEASE
from waiting import wait_until

if TYPE_CHECKING:
    from local_pods import LocalPod, LocalRelease


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


def metric(release: LocalRelease, pod: LocalPod, pattern: str) -> float:
    """A worker's or a gateway's sample whose name and labels match."""
    secret, port = ("api-key", "http") if pod.role == "gateway" else ("cluster-token", "status")
    token = release.secret(f"{RELEASE}-quire-{secret}", secret)
    page = httpx2.get(pod.url(port, "/metrics"), headers={"Authorization": f"Bearer {token}"}).text
    found = re.search(rf"^{pattern} (\S+)$", page, re.M)
    assert found, page[:2000]
    return float(found.group(1))


def stream_until_prompts_move(release: LocalRelease) -> None:
    """Until a decode pod has had a prompt from a prefill pod, which the router may only hear of."""
    moved = 'quire_prompt_tokens_by_source_total{.*source="external_kv_transfer".*}'
    repeats = 0

    def has_moved() -> bool:
        nonlocal repeats
        repeats += 10  # a prompt that no cache has
        Stream(release, 20, repeats).start().finish()
        return sum(metric(release, pod, moved) for pod in release.of("decode")) > 64

    wait_until(has_moved)
