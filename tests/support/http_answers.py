"""Completions over HTTP on this event loop: whatever ends a stream but its own end is an error."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field


@dataclass
class Choice:
    """One choice of an answer, put together again if it was streamed."""

    text: str = ""
    finish_reason: str = ""
    tokens: list[str] = field(default_factory=list)
    """With their log-probabilities, if those were asked for."""
    logprobs: list[float] = field(default_factory=list)

    def add(self, part: dict) -> None:
        """The next piece."""
        self.text += part["text"]
        self.finish_reason = part["finish_reason"] or self.finish_reason
        if scored := part.get("logprobs"):
            self.tokens += scored["tokens"]
            self.logprobs += scored["token_logprobs"]


async def choices_of(port: int, body: dict) -> list[Choice]:
    """The choices of POST /v1/completions."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    assert answer.startswith("HTTP/1.1 200"), answer[:500]
    assert '"error":' not in answer, answer[-500:]
    if body.get("stream"):
        lines = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
    else:
        parts = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["choices"]
    choices = [Choice() for _ in range(body.get("n", 1))]
    for part in parts:
        choices[part["index"]].add(part)
    return choices
