"""Workers killed and stopped under load: every request goes on, same text, and nothing leaks."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
from collections import Counter

import pytest
from pages import FailedTransfers, Growth, samples, wait_released
from server import running_server
from unlike import SMALL_STEPS, Load, answers_to, assert_same_answers, request_id
from waiting import until, wait_until

ENGINE = (
    "--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1", *SMALL_STEPS,
)  # fmt: skip
FLEETS = {
    "equal": ("--replicas", "2"),
    # by cost, short prompts would be computed where they are decoded
    "disaggregated": (
        "--prefill", "1", "--decode", "1", "--kv-lease-s", "2", "--routing-policy", "least_load",
    ),
}  # fmt: skip
RNG_SEED = 11
LONGEST_S = 80
"""For a fault to have had its effect."""
numbers = itertools.count()
CONTINUED = re.compile(
    r"request (\S+) goes on at worker (\S+), attempt (\d+), behind (\d+) tokens \((\w+)\)"
)


@pytest.fixture(scope="module")
def reference():
    with running_server(*ENGINE) as server:
        yield server


@pytest.fixture(
    scope="module", params=[pytest.param("equal", marks=pytest.mark.slow), "disaggregated"]
)
def server(request, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = (*ENGINE, "--worker-silence", "1.5", *FLEETS[request.param])
    with running_server(*flags, log=log) as server:
        wait_until(lambda: up(server) == 2, "both workers are ready")
        server.log = log
        server.has_transfers = request.param == "disaggregated"
        yield server


def up(server) -> float:
    return server.metric("quire_gateway_worker_up")


def resubmissions(server) -> dict[str, float]:
    """By reason, those that there were."""
    found = samples([server.get("/metrics")], "quire_gateway_resubmissions_total{")
    return {name.split('"')[1]: value for name, value in found.items() if value}


def assert_nothing_is_left(server, num_workers: int = 2) -> None:
    wait_until(lambda: up(server) == num_workers, "all are back", 40)
    wait_released(lambda: [server.get("/metrics")], num_workers)


async def disturb(server, how: str, rng: random.Random, has_effect) -> int:
    """Kill or stop one worker after another at random moments, while another one is ready, until
    what is to follow from it has been seen."""
    count = 0
    async with asyncio.timeout(LONGEST_S):
        while not (count > 1 and await asyncio.to_thread(has_effect)):
            await asyncio.sleep(0.3)
            if await asyncio.to_thread(up, server) < 2:
                continue
            # until the router knows both again, prompts are computed where they are decoded
            await asyncio.sleep(rng.uniform(1.0, 2.5))
            count += 1
            victim = server.worker_pid(count % 2)  # a decode worker first, then the other
            os.kill(victim, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            if how == "stopped":
                await asyncio.sleep(rng.uniform(3.0, 4.0))  # longer than silence is borne
                os.kill(victim, signal.SIGCONT)
    return count


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_answer_is_that_of_an_undisturbed_run(server, reference, how) -> None:
    load = Load([server.port], numbers)
    pages = lambda: [server.get("/metrics")]  # noqa: E731
    moved = Growth(pages, "quire_gateway_resubmissions_total{")
    # One that is stopped is so for many transfers; a kill may fall between two of them, which
    # test_prefill_faults.py sees to.
    committed = Growth(pages, "quire_kv_transfers_total{", 'outcome="committed"')
    transfers = FailedTransfers(pages) if how == "stopped" else committed

    def has_effect() -> bool:
        count = transfers.look()
        return moved.look() > 0 and (count > 0 or not server.has_transfers)

    async def disturbed() -> None:
        async with load.running():
            await disturb(server, how, random.Random(RNG_SEED), has_effect)

    asyncio.run(disturbed())
    assert_same_answers(reference, load.answers)
    assert_nothing_is_left(server)


def test_each_continuation_is_one_log_line_and_one_count(server, reference) -> None:
    """What the log says, the metric counts and a request's trace tells is the same."""
    asked = list(itertools.islice(numbers, 24))
    wait_until(lambda: up(server) == 2, "both workers are ready", 40)
    before, already = Counter(resubmissions(server)), len(server.log.read_text())

    def running() -> dict[str, float]:
        return samples([server.get("/metrics")], "quire_requests_running{")

    async def with_one_killed():
        answering = asyncio.create_task(answers_to(server.port, asked, at_once=12))
        await until(lambda: max(running().values()) >= 4, "requests run")
        [name, *_] = sorted(running(), key=lambda name: -running()[name])
        os.kill(server.worker_pid(int(name.split('engine="')[1][0])), signal.SIGKILL)
        return await answering

    got = asyncio.run(with_one_killed())
    lines = CONTINUED.findall(server.log.read_text()[already:])
    assert lines, "nothing went on"
    assert Counter(line[-1] for line in lines) == Counter(resubmissions(server)) - before
    assert sorted(lines) == sorted(line for number in asked for line in traced(server, number))
    assert_same_answers(reference, got)
    assert_nothing_is_left(server)


def traced(server, number: int) -> list[tuple[str, ...]]:
    """The continuations of a request's only prompt by its trace, as in `CONTINUED`."""
    name = request_id(number)
    [prompt] = json.loads(server.get(f"/v1/requests/{name}/trace"))["prompts"]
    return [
        (f"{name}-0", one["worker"], str(one["attempt"]), str(one["tokens_before"]), before["lost"])
        for before, one in itertools.pairwise(prompt["attempts"])
    ]
