"""`quire serve --prefill 1 --decode 2 --routers 2`: routers are asked, and not needed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pages import wait_released
from server import running_server
from unlike import Load, assert_same_answers
from waiting import wait_until

ENGINE = ("--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1")
FLAGS = (*ENGINE, "--prefill", "1", "--decode", "2", "--routers", "2")
PRIOR_RATE = 8000.0
"""Prompt tokens per second of a worker that has not reported any."""
numbers = itertools.count()


@pytest.fixture(scope="module")
def reference():
    with running_server(*ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def server():
    with running_server(*FLAGS) as server:
        wait_until(lambda: server.metric("quire_gateway_worker_up") == 3, "all workers are up")
        # the last worker has to be heard of by the routers, too
        wait_until(lambda: is_routed(server), "a router decides")
        wait_until(lambda: is_measured(server), "every worker's rate is known")
        yield server


def complete(server, prompt: str, **fields) -> dict:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 3, "temperature": 0} | fields
    return server.post("/v1/completions", body)


def trace(server, answer: dict) -> dict:
    return json.loads(server.get(f"/v1/requests/{answer['id']}/trace"))


def is_routed(server) -> bool:
    """A router decided on a request, knowing all workers."""
    [prompt] = trace(server, complete(server, "x"))["prompts"]
    return bool(prompt["routing"]) and len(prompt["routing"][0]["scores"] or ()) == 3


def is_measured(server) -> bool:
    """Every worker has computed prompts: beside a prior, what is measured on a busy machine would
    look slow, prefix or not."""
    with ThreadPoolExecutor(6) as clients:
        prompts = [f"# {time.monotonic()} {i}\n" * 10 for i in range(6)]
        list(clients.map(lambda prompt: complete(server, prompt), prompts))
    [prompt] = trace(server, complete(server, "x"))["prompts"]
    scores = prompt["routing"][0]["scores"] or () if prompt["routing"] else ()
    return len({s["worker"] for s in scores if s["prefill_tokens_per_s"] != PRIOR_RATE}) == 3


def placements(server, by: str) -> float:
    return server.metric(f'quire_gateway_placements_total{{by="{by}"')


def router_pids(server) -> list[int]:
    def is_router(pid: int) -> bool:
        return b"quire.router" in Path(f"/proc/{pid}/cmdline").read_bytes()

    return [pid for pid in server.pids()[1:] if is_router(pid)]


def test_requests_go_where_their_prefix_is(server):
    """Three prefixes over and over: each is found, by the worker that computes the rest."""
    prefixes = [f"# module {i}\n" + f"import m{i}\n" * 90 for i in range(3)]
    for turn in range(4):
        for prefix in prefixes:
            answer = complete(server, prefix + f"def f{turn}(")
            [prompt] = trace(server, answer)["prompts"]
            [routing] = prompt["routing"]
            assert prompt["attempts"][0]["placed_by"] == f"router {routing['router']}"
            if turn:
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached >= routing["expected_cached_tokens"] > 100


def test_a_cache_salt_hides_the_prefix_from_routers_and_workers_alike(server):
    """What routers expect is what workers find: nothing under another salt, all under the same."""
    prompt = "# salted\n" + "import re\n" * 90
    found = []
    for salt in (None, "a", "b", None, "b"):
        answer = complete(server, prompt, cache_salt=salt)
        [shown] = trace(server, answer)["prompts"]
        expected = shown["routing"][0]["expected_cached_tokens"]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        found.append((expected > 100, cached > 100))
        assert (expected == 0) == (cached == 0)
    assert found == [(False, False)] * 3 + [(True, True)] * 2


def test_the_scores_say_why(server):
    answer = complete(server, "import os\n" * 40 + "def ")
    [prompt] = trace(server, answer)["prompts"]
    [routing] = prompt["routing"]
    assert routing["policy"] == "cost"
    by_name = {score["worker"]: score for score in routing["scores"]}
    assert set(by_name) == {"prefill-0", "decode-1", "decode-2"}
    chosen = by_name[prompt["attempts"][0]["worker"]]
    assert chosen["eligible"]
    least = min(s["costs"]["cost_s"] for s in routing["scores"] if s["eligible"])
    assert chosen["costs"]["cost_s"] <= least + 0.001, "closer ones are drawn"


def test_a_router_that_stays_stopped_is_started_again(server):
    victim = router_pids(server)[0]
    os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: victim not in router_pids(server), "it is killed")
    wait_until(lambda: len(router_pids(server)) == 2, "another one runs")


async def soon(condition, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_answer_is_the_same_whatever_happens_to_routers(server, reference, how):
    """One, then the other, then both at once; each time requests go on, and routers come back."""
    load = Load([server.port], numbers, num_clients=4)
    harm = signal.SIGKILL if how == "killed" else signal.SIGSTOP

    async def lose(pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, harm)
        if len(pids) == 2:
            before = placements(server, "least_load")
            await soon(lambda: placements(server, "least_load") > before, "the fallback is taken")
        else:
            before = placements(server, "router")
            await soon(lambda: placements(server, "router") > before + 4, "the other one decides")
        if how == "stopped":
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        await soon(lambda: len(router_pids(server)) == 2, "both run")
        before = placements(server, "router")
        await soon(lambda: placements(server, "router") > before, "a router decides again")

    async def everything() -> None:
        async with load.running():
            for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
                await lose(router_pids(server)[which])
                await asyncio.sleep(1.5)  # both are found to be there again

    asyncio.run(everything())
    assert len(load.answers) > 20
    assert_same_answers(reference, load.answers)
    wait_released(lambda: [server.get("/metrics")], 3)
    wait_until(lambda: is_routed(server), "the routers know all workers again")
