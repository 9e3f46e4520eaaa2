"""A thousand requests against a real server, with aborts and disconnects at random moments.

No block stays owned, and memory does not grow.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from server import running_server

CONCURRENCY = 64
SETTLE_S = 30


async def one_request(port: int, rng: random.Random) -> str:
    """Send one request; read it whole, or leave at a random moment. How it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        body = {
            "model": "demo",
            "prompt": f"# variant {rng.randrange(40)}\n"
            + "import os\n" * rng.randrange(60)
            + "def ",
            "max_tokens": rng.choice([1, 8, 32, 96]),
            "n": rng.choice([1, 1, 1, 3]),
            "temperature": rng.choice([0, 0.8]),
            "stream": rng.random() < 0.7,
        }
        if rng.random() < 0.2:
            body["stop"] = ["return", "\n\n"]
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        await writer.drain()
        leave_after = rng.choice([None, None, 0, 200, 2000])
        if leave_after == 0:
            await asyncio.sleep(rng.random() * 0.05)
            return "left"
        answer = b""
        while chunk := await reader.read(4096):
            answer += chunk
            if leave_after is not None and len(answer) > leave_after:
                return "left"
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        assert b'"error":' not in answer, answer[-500:]
        return "whole"
    finally:
        writer.close()


async def load(port: int, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    limit = asyncio.Semaphore(CONCURRENCY)
    ended: dict[str, int] = {}

    async def run(number: int) -> None:
        async with limit:
            how = await one_request(port, random.Random(number))
            ended[how] = ended.get(how, 0) + 1

    await asyncio.gather(*(run(rng.randrange(2**32)) for _ in range(count)))
    return ended


def wait_idle(server) -> None:
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        if (
            server.metric("quire_requests_running{")
            == 0
            == server.metric("quire_requests_waiting{")
        ):
            return
        time.sleep(0.2)
    raise AssertionError("requests are still running after every client has gone")


# What is kept of the past grows to its bound first: the latest 1024 timelines and 4096 routing
# decisions in the gateway, 65 536 cache events in the worker, for which it takes 13 000 requests.
# Then hundreds of bytes a request are a leak; the allocator's noise is 2 MiB.
LONG = pytest.param(16_000, 20_000, 6 << 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize(("warm", "count", "growth_bytes"), [(300, 1000, 16 << 20), LONG])
def test_nothing_is_left_of_a_thousand_requests(warm, count, growth_bytes) -> None:
    # A pool too small for all: preemptions and evictions are part of it.
    with running_server("--kv-cache-memory-bytes", "24M", "--max-num-seqs", "32") as server:
        asyncio.run(load(server.port, warm, seed=1))
        wait_idle(server)
        before = server.resident_bytes()
        ended = asyncio.run(load(server.port, count, seed=2))
        wait_idle(server)
        assert ended["whole"] > count / 3
        assert ended["left"] > count / 4
        assert server.metric('quire_kv_blocks{engine="0",model_name="demo",state="owned"}') == 0
        free = server.metric('quire_kv_blocks{engine="0",model_name="demo",state="free"}')
        cached = server.metric('quire_kv_blocks{engine="0",model_name="demo",state="cached"}')
        assert free + cached == (24 << 20) // 49152
        growth = [
            after - start for after, start in zip(server.resident_bytes(), before, strict=True)
        ]
        assert max(growth) < growth_bytes
