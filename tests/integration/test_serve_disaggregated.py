"""`quire serve --prefill 1 --decode 2`: the disaggregated shape in local processes."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from pages import wait_released
from server import running_server

from quire import LLM, SamplingParams

PROMPT = "import os\n" * 60 + "def "


@pytest.fixture(scope="module")
def server():
    flags = ("--prefill", "1", "--decode", "2", "--max-model-len", "512", "--num-threads", "1")
    # by cost, short prompts on an idle machine would be computed where they are decoded
    flags += ("--routing-policy", "least_load")
    patient = ("--kv-heartbeat-s", "5", "--kv-lease-s", "60", "--kv-cache-memory-bytes", "32M")
    with running_server(*flags, *patient) as server:
        wait_for_roles(server, 3)
        yield server


def wait_for_roles(server, num_workers: int) -> None:
    """Until all workers are there, and the router sends prompts to the prefill worker: what is for
    what comes with the first load reports."""
    deadline, in_a_row = time.monotonic() + 60, 0
    while in_a_row < 8:
        assert time.monotonic() < deadline, "prompts do not go to the prefill worker"
        is_complete = server.metric("quire_gateway_worker_up") == num_workers
        in_a_row = in_a_row + 1 if is_complete and goes_to_prefill_worker(server) else 0


def goes_to_prefill_worker(server) -> bool:
    """Whether a router has a new prompt computed there."""
    body = {"model": "demo", "prompt": f"{time.monotonic()} {PROMPT}", "max_tokens": 1}
    answer = server.post("/v1/completions", body)
    [prompt] = json.loads(server.get(f"/v1/requests/{answer['id']}/trace"))["prompts"]
    [attempt] = prompt["attempts"]
    return bool(prompt["routing"]) and attempt["prefill_worker"] == "prefill-0"


def computed(server, engine: int) -> float:
    return server.metric(f'quire_step_tokens_sum{{engine="{engine}"')


def test_prompts_are_computed_by_the_prefill_worker_and_answers_are_the_same(server) -> None:
    params = SamplingParams(seed=6, max_tokens=30, n=2, temperature=0.9)
    [want] = LLM("demo", max_model_len=512).generate(PROMPT, params, use_tqdm=False)
    body = {"model": "demo", "prompt": PROMPT, "seed": 6, "max_tokens": 30, "n": 2}
    body |= {"temperature": 0.9, "top_p": 1}
    wait_for_roles(server, 3)  # anew, after the engine above has had the machine to itself
    before = computed(server, 1) + computed(server, 2)
    got = server.post("/v1/completions", body)
    assert [c["text"] for c in got["choices"]] == [c.text for c in want.outputs]
    answered = sum(len(c.token_ids) for c in want.outputs)
    assert computed(server, 1) + computed(server, 2) - before <= answered - 2


def test_a_cache_salt_hides_the_prefix_on_both_workers(server) -> None:
    """The prefill worker computes a prompt once for each salt, whatever the decode workers hold."""
    wait_for_roles(server, 3)
    prompt = "# salted\n" + PROMPT
    num_tokens, steps, texts = 0, [], set()
    for salt in ("a", "a", "b", "b"):
        before = computed(server, 0)
        body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = server.post("/v1/completions", body | {"cache_salt": salt})
        texts.add(answer["choices"][0]["text"])
        num_tokens = answer["usage"]["prompt_tokens"]
        steps.append(computed(server, 0) - before)
    assert steps[0] == steps[2] == num_tokens
    assert max(steps[1], steps[3]) <= 16
    assert len(texts) == 1


def test_many_streams_at_once_leave_nothing_behind(server) -> None:
    async def one(number: int) -> dict:
        body = {"model": "demo", "prompt": PROMPT + f"f{number}(", "max_tokens": 20, "seed": number}
        return await asyncio.to_thread(server.post, "/v1/completions", body)

    async def all_at_once() -> list[dict]:
        return await asyncio.gather(*(one(i) for i in range(24)))

    first = asyncio.run(all_at_once())
    again = asyncio.run(all_at_once())
    texts = [[a["choices"][0]["text"] for a in answers] for answers in (first, again)]
    assert texts[0] == texts[1]
    wait_released(lambda: [server.get("/metrics")], 3)


LOCAL = ["network", "inbox", "queue", "prefill", "handout", "stream"]
REMOTE = [
    "network", "inbox", "queue", "prefill_ask", "prefill_queue", "prefill", "transfer", "commit",
    "first_step", "handout", "stream",
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_the_parts_of_a_request_are_those_of_both_workers(server, stream) -> None:
    prompt = f"# {stream}\n" + "import sys\n" * 100
    body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "stream": stream}
    headers = {"x-request-id": f"parts-{stream}"}
    seen = []
    for _ in range(2):  # the second one finds its prompt where it was pushed to, or pushed again
        server.send("/v1/completions", body, headers)
        trace = json.loads(server.get(f"/v1/requests/parts-{stream}/trace"))
        total = sum(part["seconds"] for part in trace["parts"])
        assert total == pytest.approx(trace["ttft_s"], rel=0.02)
        assert min(part["seconds"] for part in trace["parts"]) >= 0
        seen.append(trace)
    first = seen[0]
    assert [part["name"] for part in first["parts"]][5:] == REMOTE
    [shown] = first["prompts"]
    assert shown["attempts"][0]["prefill_worker"] == "prefill-0"
    assert shown["transfer"]["prefill_worker"] == "prefill-0"
    assert not shown["transfer"]["failed"]
    num_blocks = -(-first["usage"]["prompt_tokens"] // 16)
    assert sum(chunk["blocks"] for chunk in shown["transfer"]["chunks"]) == num_blocks
    assert shown["routing"][0]["policy"] == "least_load"
    assert [part["name"] for part in seen[1]["parts"]][5:] in (LOCAL, REMOTE)
