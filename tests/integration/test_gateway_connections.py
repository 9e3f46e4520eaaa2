"""Raw connections: bounds before the body, disconnects, slow readers, a thousand streams."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time

import pytest
import tokenizer_folders
from gateway_server import MODEL, gateway

from quire.gateway import http_protocol, json_body
from quire.gateway.fake_worker import speak
from quire.text.tokenizer import Tokenizer

HOST = b"host: x\r\n"
JSON = b"content-type: application/json\r\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def server(tokenizer):
    script = speak(tokenizer.encode("Hello world"), stop_id=2)
    with gateway(tokenizer, script, max_body_bytes=8 << 20) as running:
        yield running


@pytest.fixture
def slow_server(tokenizer):
    """Every answer takes ten seconds: long enough to be left before its end."""
    script = speak(tokenizer.encode("Hello world") * 100, delay_s=0.05)
    with gateway(tokenizer, script, sse_keep_alive_interval=0.2) as running:
        yield running


def status_and_error(reply: bytes) -> tuple[int, str]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def post(body: bytes, *, stream: bool = False, path: bytes = b"/v1/chat/completions") -> bytes:
    head = b"POST " + path + b" HTTP/1.1\r\n" + HOST + JSON
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def chat_body(**fields) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def test_url_of_70_kb_b108(server):
    reply = server.raw(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status_and_error(reply) == (414, "url_too_long")


@pytest.mark.parametrize(
    "headers",
    [
        b"x-long: " + b"y" * 100_000 + b"\r\n",
        b"".join(b"x-%d: y\r\n" % i for i in range(5000)),
    ],
    ids=["one of 100 KB", "5000 of them"],
)
def test_headers_are_bounded_b109(server, headers):
    reply = server.raw(b"GET /livez HTTP/1.1\r\n" + HOST + headers + b"\r\n")
    assert status_and_error(reply) == (431, "headers_too_large")


def test_header_without_an_end_is_cut_off(server):
    """The parser keeps an unfinished header: its growth is ours to stop."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nx-unfinished: ")
        with pytest.raises(OSError):
            for _ in range(4000):
                sock.sendall(b"y" * 65536)


def test_head_must_arrive_in_time(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    assert status_and_error(server.raw(b"GET /livez HTTP/1.1\r\nx-half: "))[0] == 408
    assert server.raw(b"") == b""


def test_body_must_arrive_in_time_b126(server, monkeypatch):
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"content-length: 100\r\n\r\n{"
    assert status_and_error(server.raw(head)) == (408, "request_timeout")


def test_cut_off_body_never_reaches_the_worker_b127(server):
    before = len(server.worker.submitted)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(post(chat_body())[:-5])
    server.until(lambda: server.get("/load").json["server_load"] == 0)
    assert len(server.worker.submitted) == before


@pytest.mark.parametrize(
    "headers",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"content-length: -1\r\n",
        b"content-length: 5x\r\n",
    ],
)
def test_requests_that_could_be_read_two_ways_b128(server, headers):
    before = len(server.worker.submitted)
    start = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + headers + b"\r\n"
    reply = server.raw(start + b"hello")
    assert status_and_error(reply)[0] == 400
    assert len(server.worker.submitted) == before


def test_not_http(server):
    assert status_and_error(server.raw(b"\x16\x03\x01 hello\r\n\r\n"))[0] == 400


def test_body_is_refused_before_it_is_sent_b129(server):
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
    reply = server.raw(head + b"expect: 100-continue\r\ncontent-length: 9437184\r\n\r\n")
    assert b"100 Continue" not in reply
    assert status_and_error(reply) == (413, "body_too_large")


def test_chunked_body_is_bounded_too(server):
    head = (
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(head)
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(4000):
                sock.sendall(piece)
                time.sleep(0)
    assert server.get("/livez").status == 200


def test_pipelined_requests_are_answered_in_order_b131(server):
    requests = b"".join(post(chat_body(max_tokens=n)) for n in (1, 2, 3))
    reply = server.raw(requests + b"GET /livez HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n")
    texts = [part.split(b'"content":"')[1].split(b'"')[0] for part in reply.split(b"HTTP/1.1")[1:4]]
    assert texts == [b"Hello", b"Hello world", b"Hello world"]
    assert reply.endswith(b'{"state":"alive"}')


def test_stream_is_sse_whatever_is_accepted_b133(server):
    answer = server.post(
        "/v1/chat/completions", json.loads(chat_body(stream=True)), accept="text/html"
    )
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("abc-123", "abc-123"), ("x" * 10_000, "x" * 128), ("a b\tc", "abc")],
)
def test_request_id_is_echoed_sanitised_b134(server, sent, echoed):
    assert server.get("/livez", **{"x-request-id": sent}).headers["x-request-id"] == echoed


def test_request_ids_are_drawn_when_absent(server):
    first, second = (server.get("/nope").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_aborts_at_the_worker(slow_server, stream):
    """Non-streaming handlers used to run to their end for nobody."""
    with socket.create_connection(("127.0.0.1", slow_server.port)) as sock:
        sock.sendall(post(chat_body(stream=stream)))
        slow_server.until(lambda: slow_server.worker.submitted)
        if stream:
            sock.recv(100)
    slow_server.until(lambda: slow_server.worker.aborted, timeout_s=5)
    slow_server.until(lambda: slow_server.get("/load").json["server_load"] == 0)
    metrics = slow_server.get("/metrics").text
    assert "quire_gateway_disconnects_total 1.0" in metrics
    assert "quire_gateway_requests_in_flight 0.0" in metrics


def test_silent_streams_get_comments(tokenizer):
    script = speak(tokenizer.encode("Hello"), delay_s=1.0)
    with gateway(tokenizer, script, sse_keep_alive_interval=0.2) as server:
        answer = server.chat(stream=True)
        assert answer.text.startswith(": keep-alive\n\n")
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.events[0]["choices"][0]["delta"]["role"] == "assistant"


def test_slow_reader_is_cut_off_and_aborted(tokenizer):
    """It must not hold tokens without bound, nor its place at the worker."""
    words = tokenizer.encode("Hello world") * 20_000
    with gateway(
        tokenizer, speak(words), max_stream_backlog=256, model={"max_model_len": 1_000_000}
    ) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(post(chat_body(stream=True)))
            server.until(lambda: server.worker.aborted)
            server.until(lambda: server.get("/load").json["server_load"] == 0)
        assert server.chat(max_tokens=1).status == 200


def test_too_many_requests_are_told_to_wait(tokenizer):
    script = speak(tokenizer.encode("Hello world") * 100, delay_s=0.05)
    with gateway(tokenizer, script, max_open_requests=1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(post(chat_body(stream=True)))
            sock.recv(100)
            answer = server.chat()
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
            assert answer.error["type"] == "server_error"
            assert 0 < int(answer.headers["retry-after"]) <= 30
        server.until(lambda: server.get("/load").json["server_load"] == 0)


async def one_stream(port: int, body: bytes) -> int:
    """Text chunks of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(body))
    count = 0
    while line := await reader.readline():
        count += b'"content":' in line and b'"role"' not in line
        if line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return count


def test_a_thousand_streams(tokenizer, tmp_path):
    """Over the real wire: none is lost, and memory stays in proportion."""
    num_streams, num_tokens = 1000, 20
    script = speak(tokenizer.encode("the quick brown fox") * 10, delay_s=0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with gateway(tokenizer, script, grpc_socket=tmp_path / "w.sock") as server:
            body = chat_body(stream=True, max_tokens=num_tokens, model=MODEL)

            async def run_all() -> list[int]:
                streams = (one_stream(server.port, body) for _ in range(num_streams))
                return await asyncio.gather(*streams)

            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            counts = asyncio.run(run_all())
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert len(counts) == num_streams
            assert all(1 <= count <= num_tokens for count in counts)
            # both ends, worker and client of every stream live in this process
            assert grown_kib < 400 * 1024
            server.until(lambda: server.get("/load").json["server_load"] == 0)
            metrics = server.get("/metrics").text
            assert f"quire_gateway_output_tokens_total {float(num_streams * num_tokens)}" in metrics
            assert "quire_gateway_open_streams 0.0" in metrics
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
