"""The shapes that clients depend on, byte for byte where it matters."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
import tokenizer_folders
from gateway_server import MODEL, gateway

from quire.gateway.fake_worker import speak
from quire.text.tokenizer import Tokenizer

TEXT = "Hello world, 🦊"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def server(tokenizer):
    with gateway(tokenizer, speak(tokenizer.encode(TEXT), stop_id=2)) as running:
        yield running


def test_chat_stream(server):
    answer = server.chat(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    first, *middle, last = answer.events
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", first["id"])
    created = first["created"]
    assert isinstance(created, int)
    head = {
        "id": first["id"], "object": "chat.completion.chunk", "created": created, "model": MODEL,
    }  # fmt: skip
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
    assert first == {**head, "choices": [{**opening, "finish_reason": None}]}
    for event in middle:
        (choice,) = event["choices"]
        assert list(choice["delta"]) == ["content"]
        assert event == {
            **head,
            "choices": [
                {"index": 0, "delta": choice["delta"], "logprobs": None, "finish_reason": None}
            ],
        }
    assert "".join(e["choices"][0]["delta"]["content"] for e in middle) == TEXT
    ending = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last == {**head, "choices": [ending]}


def test_events_are_numbered_from_one(server):
    numbers = re.findall(r"^id: (\d+)$", server.chat(stream=True, n=2).text, re.MULTILINE)
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))


def test_completion_stream(server):
    answer = server.complete(stream=True)
    assert all(e["object"] == "text_completion" for e in answer.events)
    assert all(e["id"].startswith("cmpl-") for e in answer.events)
    assert "".join(e["choices"][0]["text"] for e in answer.events) == TEXT
    assert [e["choices"][0]["finish_reason"] for e in answer.events][-2:] == [None, "stop"]


@pytest.mark.parametrize("path", ["chat", "complete"])
def test_usage_comes_last_with_no_choices_and_only_when_asked(server, path):
    ask = getattr(server, path)
    assert all("usage" not in event for event in ask(stream=True).events)
    *events, last = ask(stream=True, stream_options={"include_usage": True}).events
    assert last["choices"] == []
    assert all("usage" not in event for event in events)
    usage = last["usage"]
    assert usage == ask().json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_running_usage_only_when_asked(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    usages = [e["usage"] for e in server.chat(stream=True, stream_options=options).events]
    completion = [u["completion_tokens"] for u in usages]
    assert completion == sorted(completion)
    assert completion[-1] > completion[0]


def test_chat_body(server):
    body = server.chat().json
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_choices_of_a_stream_each_begin_and_end_once(server):
    events = server.chat(stream=True, n=3).events
    for index in range(3):
        chunks = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert [c["delta"].get("role") for c in chunks].count("assistant") == 1
        assert chunks[0]["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert "".join(c["delta"].get("content", "") for c in chunks) == TEXT


def test_chat_logprobs_are_the_same_streamed_or_not(server, tokenizer):
    whole = server.chat(logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]
    events = server.chat(logprobs=True, top_logprobs=2, stream=True).events
    parts = [e["choices"][0]["logprobs"] for e in events]
    streamed = [token for part in parts if part for token in part["content"]]
    assert streamed == whole["content"]
    assert len(streamed) == len(tokenizer.encode(TEXT)) + 1
    data = b"".join(bytes(token["bytes"]) for token in streamed[:-1])
    assert data.decode() == TEXT
    assert all(len(token["top_logprobs"]) == 2 for token in streamed)
    assert set(streamed[0]) == {"token", "logprob", "bytes", "top_logprobs"}


def test_completion_logprobs(server):
    choice = server.complete(logprobs=1, max_tokens=2).json["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["Hello", " world"]
    assert logprobs["text_offset"] == [0, 5]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["top_logprobs"][0]["Hello"] == -0.5
    streamed = server.complete(logprobs=1, max_tokens=2, stream=True).events
    offsets = [
        o for e in streamed if (lp := e["choices"][0]["logprobs"]) for o in lp["text_offset"]
    ]
    assert offsets == [0, 5]


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_scores_the_prompt(server, max_tokens):
    """What evaluation harnesses use to score given answers."""
    answer = server.complete(prompt="Hello there", echo=True, logprobs=1, max_tokens=max_tokens)
    choice = answer.json["choices"][0]
    logprobs = choice["logprobs"]
    generated = ["Hello", " world"][:max_tokens]
    assert choice["text"] == "Hello there" + "".join(generated)
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(p < 0 for p in logprobs["token_logprobs"][1:])
    lengths = {len(values) for values in logprobs.values()}
    assert len(lengths) == 1
    assert answer.json["usage"]["completion_tokens"] == max_tokens


def test_echo_streams_the_prompt_first(server):
    events = server.complete(prompt="Hello there", echo=True, stream=True, max_tokens=1).events
    assert [e["choices"][0]["text"] for e in events] == ["Hello there", "Hello", ""]


def test_several_prompts_are_numbered_in_order(server, tokenizer):
    ids = [tokenizer.encode("one"), tokenizer.encode("two")]
    for prompt in (["one", "two"], ids):
        answer = server.complete(prompt=prompt, n=2, echo=True, max_tokens=1).json
        texts = [(c["index"], c["text"]) for c in answer["choices"]]
        assert texts == [(0, "oneHello"), (1, "oneHello"), (2, "twoHello"), (3, "twoHello")]
        assert answer["usage"]["completion_tokens"] == 4


def test_alike_prompts_draw_differently_unless_seeded(server):
    server.complete(prompt=["x", "x"])
    first, second = server.worker.submitted[-2:]
    assert first.sampling.seed != second.sampling.seed
    server.complete(prompt=["x", "x"], seed=3)
    assert {s.sampling.seed for s in server.worker.submitted[-2:]} == {3}


def test_prompt_logprobs_in_vllms_shape(server):
    body = server.chat(prompt_logprobs=0, max_tokens=1).json
    assert body["prompt_logprobs"][0] is None
    (entry,) = body["prompt_logprobs"][1].values()
    assert set(entry) == {"logprob", "rank", "decoded_token"}
    choice = server.complete(prompt_logprobs=0, max_tokens=1).json["choices"][0]
    assert choice["prompt_logprobs"][0] is None


def test_length_is_a_reason(server):
    assert server.chat(max_tokens=1).json["choices"][0]["finish_reason"] == "length"


def test_models(server):
    body = server.get("/v1/models").json
    (card,) = body["data"]
    assert body["object"] == "list"
    assert {"id": MODEL, "object": "model", "owned_by": "quire"}.items() <= card.items()
    assert card["max_model_len"] == 2048
    assert server.get(f"/v1/models/{MODEL}").json == card
    missing = server.get("/v1/models/some/other")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_tokenize_and_back(server, tokenizer):
    body = server.post("/tokenize", {"model": MODEL, "prompt": "Hello world"}).json
    assert body["tokens"] == tokenizer.encode("Hello world")
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 2048)
    assert server.post("/detokenize", {"tokens": body["tokens"]}).json == {"prompt": "Hello world"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json
    server.chat()
    assert chat["tokens"] == list(server.worker.submitted[-1].prompt_token_ids)
    named = server.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True}).json
    assert named["token_strs"] == ["Hello", " world"]


def test_content_parts_and_history(server, tokenizer):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "c"},
    ]
    assert server.chat(messages=messages).status == 200
    sent = tokenizer.decode(server.worker.submitted[-1].prompt_token_ids, skip_special_tokens=False)
    assert "<|im_start|>system\nbe kind<|im_end|>" in sent
    assert "user\na\nb<|im_end|>" in sent


def test_facts(server):
    assert server.get("/version").json["version"]
    assert server.get("/load").json["server_load"] == 0
    assert server.get("/livez").json == {"state": "alive"}


KEY = {"authorization": "Bearer sesame"}


def test_every_path_but_probes_needs_a_key(tokenizer, monkeypatch):
    """Also for paths that do not exist, and whatever the Host header says."""
    monkeypatch.setenv("QUIRE_API_KEY", "from-environment")
    with gateway(tokenizer, speak([5]), api_key=("sesame", "open")) as server:
        for path in ("/livez", "/readyz", "/startupz", "/health", "/ping", "/version"):
            assert server.get(path).status == 200
        closed = (
            "/v1/models", "/metrics", "/load", "/tokenize", "/v1/nothing", "//v1/models",
            "/V1/models", "/docs", "/openapi.json", "/v1/../health", "/health/", "/%6c/x",
        )  # fmt: skip
        for path in closed:
            answer = server.get(path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.get("/v1/models", host="x/health?").status == 401
        wrong = (
            "Bearer wrong", "Basic c2VzYW1l", "Bearer", "Bearer ", "sesame", "Bearer sesam",
            "Bearer sesame open",
        )  # fmt: skip
        for value in wrong:
            assert server.get("/v1/models", authorization=value).status == 401, value
        for key in ("sesame", "open", "from-environment"):
            assert server.get("/v1/models", authorization=f"Bearer {key}").status == 200
        assert server.get("/v1/models", authorization="bearer sesame").status == 200
        two = b"authorization: Bearer sesame\r\nauthorization: Bearer wrong\r\n"
        reply = server.raw(
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + two + b"\r\n"
        )
        assert b" 401 " in reply.splitlines()[0]
        assert "sesame" not in server.get("/metrics", **KEY).text


def test_workers_sleep_and_wake_for_the_admin_alone(tokenizer):
    admin = {"authorization": "Bearer master"}
    with gateway(tokenizer, speak([5]), api_key=("sesame",), admin_key="master") as server:
        for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
            for headers in ({}, KEY):
                answer = server.request(method, path, headers=headers)
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert server.get("/v1/models", **admin).status == 401
        assert server.get("/is_sleeping", **admin).json == {"is_sleeping": False}
        assert server.post("/sleep?level=2", None, **admin).error["param"] == "level"
        assert server.post("/sleep?level=1", None, **admin).status == 200
        assert server.get("/is_sleeping", **admin).json == {"is_sleeping": True}
        assert server.post("/wake_up", None, **admin).status == 200
        assert server.get("/is_sleeping", **admin).json == {"is_sleeping": False}
        server.worker.refusal = "requests are still running"
        refused = server.post("/sleep", None, **admin)
        assert (refused.status, refused.error["code"]) == (409, "conflict")
        assert "0: requests are still running" in refused.error["message"]
    with gateway(tokenizer, speak([5])) as server:
        refused = server.post("/sleep", None, **admin)
        assert (refused.status, refused.error["code"]) == (403, "permission_denied")


def test_each_key_has_its_own_prefix_cache(tokenizer):
    with gateway(tokenizer, speak([5]), api_key=("one", "two")) as server:
        body = {"prompt": "x"}
        for key in ("one", "two", "one"):
            assert server.post("/v1/completions", body, authorization=f"Bearer {key}").status == 200
        first, second, third = (submit.cache_salt for submit in server.worker.submitted)
        assert first == third != second
        assert len(first) == 16


def test_a_cache_salt_divides_the_prefix_cache_of_its_key(tokenizer):
    asked = [(key, salt) for key in ("one", "two") for salt in (None, "a", "a", "b")]
    with gateway(tokenizer, speak([5]), api_key=("one", "two")) as server:
        for i, (key, salt) in enumerate(asked):
            body = {"cache_salt": salt, "messages": [{"role": "user", "content": "x"}]}
            path = "/v1/chat/completions"
            if i % 2:
                path, body = "/v1/completions", {"cache_salt": salt, "prompt": "x"}
            assert server.post(path, body, authorization=f"Bearer {key}").status == 200
        salts = [submit.cache_salt for submit in server.worker.submitted]
        pairs = itertools.combinations(range(len(asked)), 2)
        assert all((salts[i] == salts[j]) == (asked[i] == asked[j]) for i, j in pairs)


def test_root_path_of_a_proxy(tokenizer):
    """The proxy has taken the prefix off; it must neither open nor close a path."""
    with gateway(tokenizer, speak([5]), root_path="/llm", api_key=("k",)) as server:
        assert server.get("/livez").status == 200
        assert server.get("/v1/models").status == 401
        assert server.get("/v1/models", authorization="Bearer k").status == 200


def test_cors_is_off_by_default_and_can_be_allowed(tokenizer, server):
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert server.request("OPTIONS", "/v1/models", headers=headers).status == 405
    with gateway(
        tokenizer, speak([5]), api_key=("k",), allowed_origins=("https://app.example",)
    ) as allowed:
        answer = allowed.request("OPTIONS", "/v1/models", headers=headers)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_torch_stays_out():
    """The gateway's image has neither torch nor transformers."""
    code = (
        "import sys; import quire.gateway.app, quire.gateway.http_protocol;"
        "print([m for m in ('torch', 'transformers', 'quire.engine', 'quire.worker')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.replace("'", '"')) == []
