"""Workers killed and stopped under load: every request goes on, same text, and nothing leaks.

The demo model on a CPU gives the same bits in any batch: a disturbed run has to equal a calm one.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest
from http_answers import choices_of
from server import running_server
from waiting import wait_until

FLEETS = {
    "equal": ("--replicas", "2"),
    "disaggregated": ("--prefill", "1", "--decode", "1", "--kv-lease-s", "2"),
}
FLAGS = (
    "--max-model-len", "512", "--kv-cache-memory-bytes", "32M",
    "--worker-silence", "1.5", "--num-threads", "1",
)  # fmt: skip
RNG_SEED = 11


@pytest.fixture(scope="module", params=FLEETS)
def server(request):
    with running_server(*FLAGS, *FLEETS[request.param]) as server:
        wait_until(lambda: server.metric("quire_gateway_worker_up") == 2, "both workers are ready")
        yield server


def request_body(number: int) -> dict:
    rng = random.Random(number)
    body = {
        "model": "demo",
        "prompt": f"# file {number % 5}\n" + "import os\n" * rng.randrange(40) + "def ",
        "max_tokens": rng.choice([60, 150, 250]),
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


async def texts_of(port: int, body: dict) -> list[tuple[str, str, int]]:
    """(text, finish reason, number of scored tokens) of each choice."""
    choices = await choices_of(port, body)
    return [(c.text, c.finish_reason, len(c.tokens)) for c in choices]


async def all_texts(port: int, numbers: range, at_once: int) -> list[list[tuple[str, str, int]]]:
    limit = asyncio.Semaphore(at_once)

    async def one(number: int) -> list[tuple[str, str, int]]:
        async with limit:
            return await texts_of(port, request_body(number))

    return await asyncio.gather(*(one(number) for number in numbers))


def resubmissions(server) -> float:
    lines = server.get("/metrics").splitlines()
    mine = [x for x in lines if x.startswith("quire_gateway_resubmissions_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in mine)


def assert_nothing_is_left(server) -> None:
    wait_until(lambda: server.metric("quire_gateway_worker_up") == 2, "both are back", 40)

    def held() -> float:
        lines = server.get("/metrics").splitlines()
        held = [x for x in lines if x.startswith("quire_kv_promised_blocks{")]
        held += [x for x in lines if x.startswith("quire_kv_blocks{") and 'state="owned"' in x]
        if len(held) < 4:
            return 1.0  # a worker did not answer in time
        return sum(float(x.rsplit(" ", 1)[1]) for x in held)

    wait_until(lambda: held() == 0, "no block is owned")


async def disturb(server, how: str, rng: random.Random, over: asyncio.Event) -> int:
    """Kill or stop one worker after another at random moments, while another one is ready."""
    count = 0
    while not over.is_set():
        await asyncio.sleep(rng.uniform(0.3, 1.0))
        ready = await asyncio.to_thread(server.metric, "quire_gateway_worker_up")
        if ready < 2 or over.is_set():
            continue
        victim = rng.choice(server.pids()[1:])
        count += 1
        if how == "killed":
            os.kill(victim, signal.SIGKILL)
        else:
            os.kill(victim, signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(3.0, 4.0))  # longer than silence is borne
            os.kill(victim, signal.SIGCONT)
    return count


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_answer_is_that_of_an_undisturbed_run(server, how) -> None:
    numbers = range(60)
    want = asyncio.run(all_texts(server.port, numbers, 8))
    before = resubmissions(server)

    async def disturbed():
        over = asyncio.Event()
        disturber = asyncio.create_task(disturb(server, how, random.Random(RNG_SEED), over))
        try:
            for _ in range(6):  # a fast machine may be through before a request is hit
                check(await all_texts(server.port, numbers, 8))
                if await asyncio.to_thread(resubmissions, server) > before:
                    break
        finally:
            over.set()
            count = await disturber
        return count

    def check(got) -> None:
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one == other, f"request {number}: {request_body(number)}"

    count = asyncio.run(disturbed())
    assert count > 0
    assert resubmissions(server) > before, f"{how} {count} times, and nothing had to go on"
    assert_nothing_is_left(server)
