"""GET /v1/requests/{id}/trace: parts that sum to the time to first token, for the right tenant."""

from __future__ import annotations

import asyncio
import threading

import pytest
import tokenizer_folders
from gateway_server import MODEL, gateway

from quire.gateway.fake_worker import speak
from quire.text.tokenizer import Tokenizer

WORKER_S = 0.2
ALICE, BOB = {"authorization": "Bearer alice"}, {"authorization": "Bearer bob"}
BODY = {"model": MODEL, "prompt": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("t")))


async def answer(submit):
    """As a worker that reports what it spent its time on."""
    await asyncio.sleep(WORKER_S)
    async for output in speak([5, 6], delay_s=0.1)(submit):
        if output.position == 0:
            output.admission.queue_s = output.admission.prefill_s = WORKER_S / 2
        yield output


@pytest.fixture(scope="module")
def server(tokenizer):
    with gateway(tokenizer, answer, api_key=("alice", "bob")) as running:
        yield running


def trace(server, request_id: str, who=ALICE):
    return server.get(f"/v1/requests/{request_id}/trace", **who)


def assert_sums_up(body) -> None:
    total = sum(part["seconds"] for part in body["parts"])
    assert total == pytest.approx(body["ttft_s"], rel=0.02)
    assert all(part["seconds"] >= 0 for part in body["parts"])
    assert "other" not in {part["name"] for part in body["parts"]}


@pytest.mark.parametrize("stream", [False, True])
def test_parts_in_order_sum_to_the_time_to_first_token(server, stream):
    made = server.post("/v1/completions", BODY | {"stream": stream, "max_tokens": 2}, **ALICE)
    answer_id = made.events[0]["id"] if stream else made.json["id"]
    body = trace(server, answer_id).json
    assert trace(server, made.headers["x-request-id"]).json == body
    assert body["object"] == "request.trace"
    assert [part["name"] for part in body["parts"]] == [
        "read", "parse", "tokenize", "wait", "route", "network", "inbox", "queue", "prefill",
        "handout", "stream",
    ]  # fmt: skip
    assert_sums_up(body)
    assert (body["state"], body["failure"], body["stream"]) == ("finished", None, stream)
    assert body["usage"]["completion_tokens"] == 2
    assert WORKER_S <= body["ttft_s"] < body["total_s"]
    [prompt] = body["prompts"]
    [attempt] = prompt["attempts"]
    assert (attempt["worker"], attempt["placed_by"]) == ("0", "least_load")


def test_only_its_own_tenant_sees_it(server):
    made = server.post("/v1/completions", BODY | {"max_tokens": 1}, **ALICE)
    for request_id in (made.json["id"], made.headers["x-request-id"]):
        assert trace(server, request_id).status == 200
        refused = trace(server, request_id, BOB)
        assert (refused.status, refused.error["code"]) == (404, "request_not_found")
        assert trace(server, request_id, {}).status == 401
    assert trace(server, "never-made").status == 404


def test_an_id_used_twice_stays_each_tenants_own(server):
    for who in (ALICE, BOB):
        server.post("/v1/completions", BODY | {"max_tokens": 1}, **who, **{"x-request-id": "mine"})
    seen = [trace(server, "mine", who).json["id"] for who in (ALICE, BOB)]
    assert seen[0] != seen[1]


def test_a_request_in_progress_shows_what_is_known(server):
    headers = ALICE | {"x-request-id": "running"}
    body = BODY | {"stream": True, "max_tokens": 2}
    request = threading.Thread(target=server.post, args=("/v1/completions", body), kwargs=headers)
    request.start()
    seen = server.until(lambda: (t := trace(server, "running")).status == 200 and t.json)
    assert seen["state"] == "running"
    assert seen["total_s"] is None
    request.join(10)
    assert trace(server, "running").json["state"] == "finished"


def test_a_refused_request_says_why(server):
    headers = ALICE | {"x-request-id": "refused"}
    server.post("/v1/completions", BODY | {"max_tokens": -1}, **headers)
    body = trace(server, "refused").json
    assert (body["state"], body["failure"]) == ("failed", "integer_below_min_value")
    assert body["ttft_s"] is None


def test_what_either_worker_had_cached_counts_as_cached(tokenizer):
    async def found_elsewhere(submit):
        async for output in speak([5])(submit):
            output.admission.cached_tokens, output.admission.remote.cached_tokens = 16, 32
            yield output

    with gateway(tokenizer, found_elsewhere) as server:
        usage = server.complete(max_tokens=1).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 32


def test_a_lost_worker_is_a_part_and_an_attempt(tokenizer):
    async def dies_once(submit):
        if submit.attempt == 0:
            fakes[0].stop()
            fakes[0].start()
        else:
            async for output in speak([5])(submit):
                yield output

    with gateway(tokenizer, dies_once) as server:
        fakes = [server.worker]
        made = server.complete(max_tokens=1)
        body = trace(server, made.json["id"], {}).json
        assert_sums_up(body)
        names = [part["name"] for part in body["parts"]]
        assert names[3:8] == ["wait", "route", "lost", "wait", "route"]
        [prompt] = body["prompts"]
        assert [(a["attempt"], a["lost"]) for a in prompt["attempts"]] == [(0, "lost"), (1, None)]
