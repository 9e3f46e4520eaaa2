"""Streams one after another from several clients, each compared with the first answer."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from dataclasses import dataclass, field

BODY = {
    "model": "demo",
    "prompt": "import os\n" * 8 + "def ",
    "max_tokens": 120,
    "temperature": 0.7,
}


@dataclass
class Load:
    """Clients in threads, between `__enter__` and `__exit__`."""

    url: str
    num_clients: int = 3
    key: str = ""
    """API key, where one is needed."""
    failures: list[str] = field(default_factory=list)
    finished: int = 0
    longest_gap_s: float = 0.0
    """Between two pieces of a stream."""
    pieces: dict[int, int] = field(default_factory=dict)
    """Client -> pieces of streams that it got."""
    longest_wait: int = 0
    """Most pieces that other clients got while one waited for its next."""
    _wanted: dict[int, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for seed in range(self.num_clients):
            self._wanted[seed] = self.stream(seed)
        self._threads = [
            threading.Thread(target=self._run, args=(seed,)) for seed in range(self.num_clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _run(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                text = self.stream(seed)
            except (OSError, ValueError, KeyError) as error:
                self.failures.append(repr(error))
                continue
            if text != self._wanted[seed]:
                self.failures.append(f"another text: {text!r}")
            self.finished += 1

    def stream(self, seed: int) -> str:
        """The text of one answer. Raises ValueError when it is cut off."""
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(BODY | {"seed": seed, "stream": True}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        pieces, last = [], time.monotonic()
        others = self._pieces_of_others(seed)
        with urllib.request.urlopen(request, timeout=90) as answer:
            for line in answer:
                now = time.monotonic()
                self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return "".join(pieces)
                event = json.loads(line[6:])
                pieces.append(event["choices"][0]["text"])
                before, others = others, self._pieces_of_others(seed)
                self.longest_wait = max(self.longest_wait, others - before)
                self.pieces[seed] = self.pieces.get(seed, 0) + 1
        raise ValueError("the stream ended without [DONE]")

    def _pieces_of_others(self, seed: int) -> int:
        return sum(got for client, got in tuple(self.pieces.items()) if client != seed)


def complete(url: str, prompt: str, max_tokens: int = 16) -> str:
    """One short answer, always with the same draws."""
    body = BODY | {"prompt": prompt, "max_tokens": max_tokens, "seed": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.load(answer)["choices"][0]["text"]
