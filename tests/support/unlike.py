"""Load of requests of which no two are alike, kept with their answers to be asked elsewhere again.

Nothing of a prompt is cached anywhere: each is computed, by the prefill worker where there is one,
and its blocks travel. The demo model on a CPU gives the same bits in any batch, so that any engine
of the same type is a reference: `assert_same_answers`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from server import Server

Texts = list[tuple[str, str, int]]
"""Of each choice: text, finish reason, number of scored tokens."""
AT_ONCE_S = 1.0
"""A gateway that ends closes the connections whose requests it has not read yet within this."""
SMALL_STEPS = ("--max-num-seqs", "32", "--max-num-batched-tokens", "32")
"""Flags of workers whose prompts take many steps, so that something befalls them on their way."""


def request_id(number: int) -> str:
    return f"unlike-{number}"


def request_body(number: int) -> dict:
    """Two of three answer for a while, the third has a long prompt: up to 500 tokens in all."""
    rng = random.Random(number)
    is_long = number % 3 == 2
    body = {
        "model": "demo",
        "prompt": f"# file {number}\n"
        + "import os\n" * (rng.randrange(70, 110) if is_long else rng.randrange(60))
        + "def ",
        "max_tokens": rng.choice([4, 12] if is_long else [60, 150, 250]),
        "ignore_eos": True,
        "n": rng.choice([1, 1, 2]),
        "stream": rng.random() < 0.8,
        "temperature": rng.choice([0, 0.9]),
        "seed": number,
    }
    if rng.random() < 0.3:
        body["stop"] = ["self"]
    if rng.random() < 0.2:
        body["logprobs"] = 1
    return body


class TurnedAway(Exception):
    """Nobody listens, or who does closed the connection at once, the request unread."""


async def texts_of(port: int, number: int) -> Texts:
    """The answer to a request. Raises TurnedAway when it has to be asked elsewhere."""
    body = request_body(number)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    except ConnectionRefusedError as error:
        raise TurnedAway from error
    began = time.monotonic()
    try:
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nX-Request-Id: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (request_id(number).encode(), len(data), data)
        )
        first = await _first_of(reader)
        if not first and time.monotonic() - began < AT_ONCE_S:
            raise TurnedAway
        answer = (first + await reader.read()).decode()
    finally:
        writer.close()
    assert answer.startswith("HTTP/1.1 200"), answer[:500]
    assert '"error":' not in answer, answer[-500:]
    return _choices(answer, body)


async def _first_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(1)
    except ConnectionError:
        return b""


def _choices(answer: str, body: dict) -> Texts:
    if body["stream"]:
        lines = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
        assert lines, answer
        assert lines[-1] == "[DONE]", "the stream was cut off"
        parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
    else:
        parts = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["choices"]
    texts, ends, scored = [""] * body["n"], [""] * body["n"], [0] * body["n"]
    for part in parts:
        i = part["index"]
        texts[i] += part["text"]
        ends[i] = part["finish_reason"] or ends[i]
        scored[i] += len((part.get("logprobs") or {"tokens": ()})["tokens"])
    return list(zip(texts, ends, scored, strict=True))


async def answers_to(port: int, numbers: Sequence[int], at_once: int = 8) -> dict[int, Texts]:
    """By number."""
    limit = asyncio.Semaphore(at_once)

    async def one(number: int) -> Texts:
        async with limit:
            return await texts_of(port, number)

    answers = await asyncio.gather(*(one(number) for number in numbers))
    return dict(zip(numbers, answers, strict=True))


def assert_same_answers(reference: Server, got: Mapping[int, Texts]) -> None:
    """An engine that nothing happens to gives these very answers."""
    want = asyncio.run(answers_to(reference.port, list(got), at_once=16))
    for number, answer in got.items():
        assert answer == want[number], f"request {number}: {request_body(number)}"


@dataclass
class Load:
    """Clients that ask one request after the other, while `running`.

    A client is at one of several gateways, and goes to the next one when that one takes no
    requests any more; any other failure fails the test.
    """

    ports: Sequence[int]
    numbers: Iterator[int]
    """Of the requests; never the same twice."""
    num_clients: int = 8
    answers: dict[int, Texts] = field(default_factory=dict)
    turned_away: int = 0
    """How often a client had to go to another gateway."""

    @asynccontextmanager
    async def running(self):
        over, before = asyncio.Event(), len(self.answers)
        async with asyncio.TaskGroup() as clients:
            for i in range(self.num_clients):
                clients.create_task(self._client(i, over))
            try:
                yield
            finally:
                over.set()
        assert len(self.answers) - before > self.num_clients, "there was no load"

    async def _client(self, number: int, over: asyncio.Event) -> None:
        at = number
        while not over.is_set():
            asked = next(self.numbers)
            for _ in self.ports[1:]:
                with suppress(TurnedAway):
                    self.answers[asked] = await texts_of(self.ports[at % len(self.ports)], asked)
                    break
                at += 1
                self.turned_away += 1
            else:
                self.answers[asked] = await texts_of(self.ports[at % len(self.ports)], asked)
