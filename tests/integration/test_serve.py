"""`quire serve` as a whole: same tokens as in process, and requests that outlive their worker."""

from __future__ import annotations

import json
import os
import signal
import urllib.request

import pytest
from server import running_server

from quire import LLM, SamplingParams

PROMPT = "import os\n\ndef "


@pytest.fixture(scope="module")
def server():
    with running_server("--max-model-len", "512") as server:
        yield server


def test_http_gives_the_tokens_of_the_engine_in_process(server) -> None:
    [want] = LLM("demo", max_model_len=512).generate(
        PROMPT, SamplingParams(seed=5, max_tokens=40, n=2, temperature=0.9), use_tqdm=False
    )
    body = {"model": "demo", "prompt": PROMPT, "seed": 5, "max_tokens": 40, "n": 2}
    # top_p named: where a request names none, a server takes the model's generation_config
    got = server.post("/v1/completions", body | {"temperature": 0.9, "top_p": 1})
    assert [c["text"] for c in got["choices"]] == [c.text for c in want.outputs]
    assert got["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in want.outputs)


def test_cached_tokens_are_reported(server) -> None:
    body = {"model": "demo", "prompt": "x = 1\n" * 40, "max_tokens": 2}
    server.post("/v1/completions", body)
    usage = server.post("/v1/completions", body)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


def test_metrics_have_the_names_dashboards_ask_for(server) -> None:
    server.post("/v1/completions", {"model": "demo", "prompt": PROMPT, "max_tokens": 4})
    page = server.get("/metrics")
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket", "vllm:cache_config_info",
        "vllm:prompt_tokens_total", "quire_gateway_requests_total",
    ):  # fmt: skip
        assert f"\n{name}{{" in page or f"\n{name} " in page, name
    lines = [line for line in page.splitlines() if line and not line.startswith("#")]
    names = [line.split("{")[0].split(" ")[0] + line.rsplit(" ", 1)[0] for line in lines]
    assert len(names) == len(set(names)), "a sample is exported twice"


def test_a_request_goes_on_when_its_killed_worker_is_back(server) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "seed": 3}
    want = server.post("/v1/completions", body)["choices"][0]["text"]
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as stream:
        first = stream.readline()
        [worker] = server.pids()[1:]
        os.kill(worker, signal.SIGKILL)
        rest = first.decode() + stream.read().decode()
    events = [line for line in rest.splitlines() if line.startswith("data: {")]
    assert not any('"error":' in event for event in events)
    got = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
    assert got == want
    assert server.pids()[1:] != [worker]
    assert server.metric("quire_gateway_worker_restarts_total") == 1
    assert server.metric('quire_gateway_resubmissions_total{reason="lost"}') == 1
