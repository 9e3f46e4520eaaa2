"""The gateway and its worker over gRPC: starting, failing, dying, coming back."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading

import fake_servicer
import pytest
import tokenizer_folders
from gateway_server import MODEL, gateway

from quire.gateway.continuation import Continuation
from quire.gateway.fake_worker import speak
from quire.gateway.generation import Generation
from quire.gateway.replies import Replies
from quire.gateway.stream import EventStream
from quire.gateway.traffic import RequestClock
from quire.gateway.worker_client import _Pending
from quire.proto import common_pb2, worker_pb2
from quire.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("t")))


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "worker.sock"


def words(tokenizer, times=1):
    return tokenizer.encode("Hello world") * times


def fail_with(code, message="no", **fields):
    async def script(submit):
        yield worker_pb2.Failure(attempt=submit.attempt, code=code, message=message, **fields)

    return script


FAILURE = worker_pb2.Failure
FAILURES = [
    (FAILURE.CODE_INVALID, 400, "invalid_value", None),
    (FAILURE.CODE_OVERLOADED, 503, "overloaded", "3"),
    (FAILURE.CODE_DEADLINE, 504, "deadline_exceeded", None),
    (FAILURE.CODE_NOT_READY, 503, "not_ready", "3"),
    (FAILURE.CODE_INTERNAL, 500, "internal_error", None),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("code", "status", "name", "retry"), FAILURES)
def test_refusals_of_the_worker_are_statuses(tokenizer, code, status, name, retry, stream):
    script = fail_with(code, "secret /path", retry_after_ms=2100 if retry else 0)
    with gateway(tokenizer, script) as server:
        answer = server.chat(stream=stream)
        assert (answer.status, answer.error["code"]) == (status, name)
        assert answer.headers.get("retry-after") == retry
        if status == 500:
            assert "secret" not in answer.text


def test_start_is_told_and_requests_wait_for_it(tokenizer, socket_path):
    with gateway(tokenizer, speak(words(tokenizer)), grpc_socket=socket_path, wait=False) as server:
        server.until(lambda: server.get("/startupz").json["phase"] == "load")
        progress = server.get("/startupz")
        assert progress.status == 503
        assert {k: progress.json[k] for k in ("state", "done", "total", "unit")} == {
            "state": "starting", "done": 1, "total": 4, "unit": "shards",
        }  # fmt: skip
        assert set(progress.json) == {
            "state", "phase", "detail", "done", "total", "unit", "elapsed_seconds", "workers",
            "workers_ready",
        }  # fmt: skip
        for path in ("/readyz", "/health", "/ping", "/v1/models", "/startupz"):
            assert server.get(path).status == 503
        for path in ("/livez", "/version", "/load", "/metrics"):
            assert server.get(path).status == 200
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "not_ready")
        assert refused.headers["retry-after"]
        server.worker.model = worker_pb2.ModelInfo(
            model=str(tokenizer.folder), max_model_len=100, vocab_size=tokenizer.vocab_size
        )
        server.until(lambda: server.get("/readyz").status == 200)
        assert server.chat().status == 200
        assert server.get("/startupz").json["state"] == "ready"
        for path in ("/health", "/ping", "/v1/models", "/startupz"):
            assert server.get(path).status == 200


def test_tokenizer_that_cannot_be_loaded_is_said_so(tokenizer):
    with gateway(tokenizer, speak([5]), chat_template="missing.jinja", wait=False) as server:
        progress = server.until(
            lambda: (p := server.get("/startupz").json)["state"] == "failed" and p
        )
        assert "missing.jinja" in progress["detail"]
        assert server.chat().status == 503


def test_nothing_is_left_of_requests_that_ended_in_any_way(tokenizer, socket_path):
    script = speak(words(tokenizer, 20), delay_s=0.001)
    with gateway(tokenizer, script, grpc_socket=socket_path) as server:

        def round_of_requests():
            for fields in ({}, {"stream": True}, {"stop": "world"}, {"n": 3}, {"max_tokens": -1}):
                server.chat(**fields)
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
                head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
                kind = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
                sock.sendall(head + kind % len(body) + body)
                sock.recv(50)
            server.until(lambda: server.get("/load").json["server_load"] == 0)

        def objects():
            gc.collect()
            kinds = (Replies, Generation, EventStream, RequestClock, Continuation, _Pending)
            return sum(type(o) in kinds for o in gc.get_objects())

        async def num_tasks():
            return len(asyncio.all_tasks())

        round_of_requests()
        before = server.run(num_tasks())
        for _ in range(10):
            round_of_requests()
        server.until(lambda: objects() == 0)
        # a few come and go with the load reports
        server.until(lambda: server.run(num_tasks()) <= before + 3)


def test_metrics_hold_the_workers_page(tokenizer, socket_path):
    with gateway(tokenizer, speak(words(tokenizer)), grpc_socket=socket_path) as server:
        server.chat()
        page = server.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "quire_fake 1.0" in page.text
        assert "quire_gateway_worker_up 1.0" in page.text
        assert (
            'quire_gateway_requests_total{code="200",route="/v1/chat/completions"} 1.0' in page.text
        )
        assert "vllm:" not in page.text


def in_background(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


@pytest.mark.parametrize("how", ["killed", "session ends", "watch ends", "falls silent"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_goes_on_when_its_only_worker_comes_back(tokenizer, socket_path, how, stream):
    """A killed worker can look like an orderly end of the stream: both are losses."""
    spoken = words(tokenizer, 50)
    script = speak(spoken, delay_s=0.02)
    with gateway(tokenizer, script, grpc_socket=socket_path, worker_silence=0.6) as server:
        thread, results = in_background(lambda: server.chat(stream=stream))
        server.until(lambda: server.worker.submitted)
        server.until(lambda: "output_tokens_total 0.0" not in server.get("/metrics").text)
        old = server.worker
        if how == "killed":
            server.run(server.grpc_server.stop(None))
            server.until(lambda: server.get("/readyz").status == 503)
            assert "quire_gateway_worker_up 0.0" in server.get("/metrics").text
            server.worker = fake_servicer.FakeServicer(old.model, script)
            server.grpc_server = server.run(
                fake_servicer.start(server.worker, server.worker_address)
            )
        else:
            event = {
                "session ends": old.end_session, "watch ends": old.end_watch,
                "falls silent": old.hold_watch,
            }[how]  # fmt: skip
            server.loop.call_soon_threadsafe(event.set)
            server.until(lambda: server.get("/readyz").status == 503)
            server.loop.call_soon_threadsafe(event.clear)
        thread.join(30)
        (answer,) = results
        assert answer.status == 200
        if stream:
            chunks = [e["choices"][0] for e in answer.events]
            text = "".join(c["delta"].get("content", "") for c in chunks)
            assert sum(c["delta"].get("role") is not None for c in chunks) == 1
        else:
            text = answer.json["choices"][0]["message"]["content"]
            assert answer.json["usage"]["completion_tokens"] == len(spoken)
        assert text == "Hello world" * 50
        resumed = server.worker.submitted[-1]
        assert resumed.attempt == 1
        assert list(resumed.resumed[0].token_ids) == spoken[: len(resumed.resumed[0].token_ids)]
        reason = "silent" if how == "falls silent" else "lost"
        page = server.get("/metrics").text
        assert f'quire_gateway_resubmissions_total{{reason="{reason}"}} 1.0' in page


def test_a_hung_engine_loses_its_requests_until_it_moves(tokenizer, socket_path):
    script = speak(words(tokenizer, 20), delay_s=0.02)
    with gateway(tokenizer, script, grpc_socket=socket_path, max_step_age=5.0) as server:
        thread, results = in_background(lambda: server.chat(stream=True))
        server.until(lambda: "output_tokens_total 0.0" not in server.get("/metrics").text)
        server.worker.step_age_s = 6.0
        server.until(lambda: server.get("/readyz").status == 503)
        server.until(lambda: server.worker.aborted == [1])
        server.worker.step_age_s = 0.0
        thread.join(30)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in results[0].events)
        assert text == "Hello world" * 20
        assert server.worker.sessions == 1
        assert 'resubmissions_total{reason="hung"} 1.0' in server.get("/metrics").text


def test_a_request_fails_when_its_worker_does_not_come_back_in_time(tokenizer, socket_path):
    script = speak(words(tokenizer, 200), delay_s=0.02)
    with gateway(tokenizer, script, grpc_socket=socket_path, worker_wait=0.5) as server:
        for stream in (True, False):
            thread, results = in_background(lambda stream=stream: server.chat(stream=stream))
            server.until(lambda: server.get("/load").json["server_load"] == 1)
            server.until(lambda: server.worker.submitted)
            server.worker.submitted.clear()
            server.run(server.grpc_server.stop(None))
            thread.join(30)
            (answer,) = results
            if stream and answer.status == 200:
                assert answer.events[-1]["error"]["code"] == "worker_lost"
                assert answer.events[-1]["error"]["type"] == "server_error"
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert (answer.status, answer.error["code"]) == (503, "worker_lost")
                assert answer.headers["retry-after"]
            server.grpc_server = server.run(
                fake_servicer.start(server.worker, server.worker_address)
            )
            server.until(lambda: server.get("/readyz").status == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_stop_string_ends_the_request_at_the_worker(tokenizer, socket_path, stream):
    script = speak(words(tokenizer, 100), delay_s=0.01)
    with gateway(tokenizer, script, grpc_socket=socket_path) as server:
        answer = server.chat(stop="wor", stream=stream)
        if stream:
            chunks = [e["choices"][0] for e in answer.events]
            assert "".join(c["delta"].get("content", "") for c in chunks) == "Hello "
            end = chunks[-1]
        else:
            end = answer.json["choices"][0]
            assert end["message"]["content"] == "Hello "
            assert answer.json["usage"]["completion_tokens"] == 2
        assert (end["finish_reason"], end["stop_reason"]) == ("stop", "wor")
        server.until(lambda: server.worker.aborted, timeout_s=5)


def test_choices_that_stopped_are_not_mixed_up_with_those_that_go_on(tokenizer):
    """The engine may go on for a while with a choice that ended at a stop string."""
    hello, world = tokenizer.encode("Hello world")

    async def script(submit):
        for position in range(6):
            for choice in range(2):
                yield worker_pb2.ChoiceOutput(
                    choice=choice,
                    position=position,
                    token_ids=[world if choice == 1 and position == 2 else hello],
                    finish_reason=common_pb2.FINISH_REASON_LENGTH if position == 5 else 0,
                )
            if position % 2:
                await asyncio.sleep(0.01)

    with gateway(tokenizer, script) as server:
        choices = server.chat(n=2, stop="world").json["choices"]
        assert [c["message"]["content"] for c in choices] == ["Hello" * 6, "HelloHello "]
        assert [c["finish_reason"] for c in choices] == ["length", "stop"]
        assert server.worker.aborted_choices == [(1, 1)]


def test_what_the_worker_is_told(tokenizer, socket_path):
    with gateway(
        tokenizer, speak(words(tokenizer)), grpc_socket=socket_path, request_timeout=60.0
    ) as server:
        answer = server.request(
            "POST",
            "/v1/chat/completions",
            {
                "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 7,
                "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2,
                "max_tokens": 9, "min_tokens": 1, "presence_penalty": 0.1,
                "frequency_penalty": 0.2, "repetition_penalty": 1.1, "stop_token_ids": [3],
                "ignore_eos": True, "logit_bias": {"4": -100}, "bad_words": ["fox"],
                "allowed_token_ids": [1, 2, 3], "logprobs": True, "top_logprobs": 2,
                "priority": -3,
            },
            {"x-request-id": "abc", "x-request-timeout": "5"},
        )  # fmt: skip
        assert answer.status == 200
        (submit,) = server.worker.submitted
        s = submit.sampling
        assert (s.n, s.max_tokens, s.min_tokens, s.top_k, s.seed) == (2, 9, 1, 5, 7)
        floats = (s.temperature, s.top_p, s.min_p, s.presence_penalty, s.frequency_penalty)
        assert floats == pytest.approx((0.5, 0.9, 0.1, 0.1, 0.2))
        assert s.repetition_penalty == pytest.approx(1.1)
        assert (list(s.stop_token_ids), s.ignore_eos, dict(s.logit_bias)) == ([3], True, {4: -100})
        assert (list(s.allowed_token_ids), s.logprobs) == ([1, 2, 3], 2)
        assert [list(w.ids) for w in s.bad_words] == tokenizer.bad_words_ids(["fox"])
        assert (submit.priority, submit.timeout_ms, submit.attempt) == (-3, 5000, 0)
        assert submit.request_id == "abc-0"


def test_defaults_of_the_two_apis(tokenizer):
    with gateway(tokenizer, speak(words(tokenizer))) as server:
        server.chat()
        chat = server.worker.submitted[-1]
        assert chat.sampling.max_tokens == 2048 - len(chat.prompt_token_ids)
        server.complete()
        assert server.worker.submitted[-1].sampling.max_tokens == 16
        server.complete(prompt=[5] * 2040)
        assert server.worker.submitted[-1].sampling.max_tokens == 8


def test_sampling_defaults_come_from_the_model(tmp_path, tokenizer):
    folder = tokenizer_folders.byte_level(tmp_path / "t")
    defaults = {"temperature": 0.25, "top_k": 7, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with gateway(Tokenizer(folder), speak(words(tokenizer))) as server:
        server.chat()
        assert server.worker.submitted[-1].sampling.temperature == 0.25
        assert server.worker.submitted[-1].sampling.top_k == 7
        server.chat(temperature=1, top_k=0)
        assert server.worker.submitted[-1].sampling.temperature == 1
        assert server.worker.submitted[-1].sampling.top_k == 0


def test_deadline_in_the_middle_is_an_error(tokenizer):
    async def script(submit):
        yield worker_pb2.ChoiceOutput(token_ids=[5, 6])
        yield worker_pb2.ChoiceOutput(position=2, finish_reason=common_pb2.FINISH_REASON_DEADLINE)

    with gateway(tokenizer, script) as server:
        assert (server.chat().status, server.chat().error["code"]) == (504, "deadline_exceeded")
        assert server.chat(stream=True).status == 504 or (
            server.chat(stream=True).events[-1]["error"]["code"] == "deadline_exceeded"
        )


def test_repeated_and_stale_tokens_are_dropped(tokenizer):
    """Exactly once: the journal takes a token when attempt and position are what comes next."""
    hello, world = tokenizer.encode("Hello world")

    async def script(submit):
        out = worker_pb2.ChoiceOutput
        yield out(token_ids=[hello])
        yield out(token_ids=[hello])
        yield out(attempt=1, position=1, token_ids=[hello])
        yield out(choice=5, position=1, token_ids=[hello])
        yield out(position=1, token_ids=[world], finish_reason=common_pb2.FINISH_REASON_LENGTH)

    with gateway(tokenizer, script) as server:
        answer = server.chat().json
        assert answer["choices"][0]["message"]["content"] == "Hello world"
        assert answer["usage"]["completion_tokens"] == 2


def test_missing_tokens_are_asked_for_again(tokenizer):
    hello, world = tokenizer.encode("Hello world")

    async def script(submit):
        out = worker_pb2.ChoiceOutput
        if submit.attempt == 0:
            yield out(token_ids=[hello])
            await asyncio.sleep(0.05)
            yield out(position=3, token_ids=[hello])
            await asyncio.sleep(30)
        assert [list(r.token_ids) for r in submit.resumed] == [[hello]]
        end = common_pb2.FINISH_REASON_LENGTH
        yield out(attempt=1, position=1, token_ids=[world], finish_reason=end)

    with gateway(tokenizer, script) as server:
        text = "".join(
            e["choices"][0]["delta"].get("content", "") for e in server.chat(stream=True).events
        )
        assert text == "Hello world"
        server.until(lambda: server.worker.aborted == [1])
