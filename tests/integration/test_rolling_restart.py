"""Workers that end, stop for ever or change their role under steady load: no request fails, every
text is that of a calm run, and sequences that leave a worker in good order take their KV along."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
from server import running_server
from test_continuation import request_body, resubmissions, texts_of, wait_until

FLAGS = (
    "--prefill", "1", "--decode", "2", "--max-model-len", "512", "--kv-cache-memory-bytes", "32M",
    "--num-threads", "1", "--kv-lease-s", "10", "--kv-heartbeat-s", "2",
)  # fmt: skip
NUMBERS = range(40)
AT_ONCE = 8
RESTART_S = 60
MIGRATED = "quire_migrated_sequences_total"


@pytest.fixture(scope="module")
def server():
    with running_server(*FLAGS) as server:
        wait_until(lambda: up(server) == 3, "all workers are ready", RESTART_S)
        yield server


@pytest.fixture(scope="module")
def calm(server):
    """The texts of an undisturbed run, by request."""

    async def ask_all():
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(number: int):
            async with limit:
                return await texts_of(server.port, request_body(number))

        return await asyncio.gather(*(one(number) for number in NUMBERS))

    return asyncio.run(ask_all())


def up(server) -> float:
    return server.metric("quire_gateway_worker_up")


def samples(server, start: str, *parts: str) -> list[float]:
    lines = server.get("/metrics").splitlines()
    mine = [x for x in lines if x.startswith(start) and all(part in x for part in parts)]
    return [float(line.rsplit(" ", 1)[1]) for line in mine]


@asynccontextmanager
async def steady_load(server, calm):
    """Requests without a pause; each answer is compared."""
    over, count = asyncio.Event(), 0

    async def client(first: int) -> None:
        nonlocal count
        number = first
        while not over.is_set():
            got = await texts_of(server.port, request_body(number))
            assert got == calm[number], f"request {number}: {request_body(number)}"
            number = (number + AT_ONCE) % len(calm)
            count += 1

    async with asyncio.TaskGroup() as clients:
        for i in range(AT_ONCE):
            clients.create_task(client(i))
        try:
            yield
        finally:
            over.set()
    assert count > len(calm) // 2


async def until(condition, what: str, seconds: float = RESTART_S) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def assert_nothing_is_left(server) -> None:
    def held() -> bool:
        owned = samples(server, "quire_kv_blocks{", 'state="owned"')
        return len(owned) == 3 and not any(owned)

    wait_until(held, "no block is owned", 30)


@pytest.mark.slow
def test_every_worker_is_restarted_and_nobody_notices(server, calm) -> None:
    moved_with_kv = 0.0

    async def restart_all() -> None:
        nonlocal moved_with_kv
        for pid in server.pids()[1:]:
            os.kill(pid, signal.SIGTERM)
            await until(lambda pid=pid: pid not in server.pids(), "it ended")
            moved_with_kv += sum(samples(server, MIGRATED, 'how="kv"'))
            await until(lambda: up(server) == 3, "it is back")
            await asyncio.sleep(0.5)

    async def run() -> None:
        async with steady_load(server, calm):
            await restart_all()

    before = samples(server, "quire_gateway_resubmissions_total", 'reason="draining"')
    asyncio.run(run())
    after = samples(server, "quire_gateway_resubmissions_total", 'reason="draining"')
    assert sum(after) > sum(before)
    assert moved_with_kv > 0
    assert_nothing_is_left(server)


@pytest.mark.slow
def test_a_worker_that_stays_stopped_is_replaced(server, calm) -> None:
    before = resubmissions(server)

    async def run() -> None:
        async with steady_load(server, calm):
            [*_, victim] = server.pids()
            os.kill(victim, signal.SIGSTOP)
            await until(lambda: victim not in server.pids(), "it was killed", 30)
            await until(lambda: up(server) == 3, "another is there")

    asyncio.run(run())
    assert resubmissions(server) > before
    assert_nothing_is_left(server)
