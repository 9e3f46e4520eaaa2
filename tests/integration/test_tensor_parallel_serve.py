"""Ranks killed and stopped under load, in a server of two replicas of two ranks each.

A replica that lost a rank is lost as a whole; its requests go on at the other, with the same text.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from server import running_server
from test_continuation import assert_nothing_is_left, resubmissions
from unlike import answers_to, assert_same_answers
from waiting import wait_until

FLAGS = (
    "-tp", "2", "--max-model-len", "512",
    "--kv-cache-memory-bytes", "32M", "--num-threads", "1",
)  # fmt: skip
START_S = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with running_server("--replicas", "2", *FLAGS) as server:
        wait_until(lambda: server.metric("quire_gateway_worker_up") == 2, "both are ready", START_S)
        yield server


@pytest.fixture(scope="module")
def reference():
    """One replica: in bf16 the sums of two ranks differ in the last bits from those of one."""
    with running_server(*FLAGS) as server:
        yield server


def children_of(pid: int) -> list[int]:
    """Started by any thread of a process."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def ranks(server) -> list[int]:
    """Processes of the ranks beyond the first."""
    return [pid for worker in server.pids()[1:] for pid in children_of(worker)]


async def disturb(server, number: int, over: asyncio.Event) -> list[int]:
    """Send a signal to one rank after another while both replicas are ready; returns to whom."""
    rng, victims = random.Random(number), []
    while not over.is_set():
        await asyncio.sleep(rng.uniform(0.3, 1.0))
        up = await asyncio.to_thread(server.metric, "quire_gateway_worker_up")
        found = ranks(server)
        # a stopped rank counts as there until its silence was too long
        is_calm = up == 2 and len(found) == 2 and not set(victims) & set(found)
        if is_calm and not over.is_set():
            victims.append(rng.choice(found))
            os.kill(victims[-1], number)
    return victims


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_every_answer_is_that_of_an_undisturbed_run(server, reference, number) -> None:
    numbers = range(100 * number, 100 * number + 40)
    before = resubmissions(server)

    async def disturbed():
        over = asyncio.Event()
        disturber = asyncio.create_task(disturb(server, number, over))
        try:
            got = await answers_to(server.port, numbers)
        finally:
            over.set()
            victims = await disturber
        return got, victims

    got, victims = asyncio.run(disturbed())
    assert victims
    assert_same_answers(reference, got)
    assert resubmissions(server) != before, f"{victims} were lost, and nothing had to go on"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in victims), "ranks ended")
    wait_until(lambda: server.metric("quire_gateway_worker_up") == 2, "both are back", START_S)
    assert_nothing_is_left(server)


def test_ranks_end_with_their_worker(server) -> None:
    wait_until(lambda: len(ranks(server)) == 2, "both replicas are whole", START_S)
    worker = server.pids()[1]
    mine = children_of(worker)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine), "ranks ended")
