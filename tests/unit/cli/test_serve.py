"""`quire serve` as a process: it opens its port at once, serves, survives, and ends cleanly."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from quire.cli.http_server import greeting
from quire.config.gateway import GatewayConfig

START_S = 90


class Server:
    """A `quire serve` process."""

    def __init__(self, folder, *argv):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.out, self.err = folder / "out", folder / "err"
        env = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        env["TMPDIR"] = str(folder)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "quire", "serve", *argv, "--port", str(self.port)],
                stdout=out, stderr=err, env=env,
            )  # fmt: skip
        self.folder = folder

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def complete(self):
        body = json.dumps({"model": "demo", "prompt": "def ", "max_tokens": 3}).encode()
        request = urllib.request.Request(
            self.url + "/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    def wait(self, condition, seconds=START_S):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"did not happen: {self.err.read_text()[-2000:]}")

    def is_open(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def worker(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = children.read_text().split()
        return int(pids[0]) if pids else None

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(*argv):
        started.append(Server(tmp_path, *argv))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_server_from_start_to_end(serve):
    began = time.monotonic()
    server = serve("demo")
    server.wait(server.is_open)
    assert time.monotonic() - began < 5, "0.2 s on an idle machine"
    server.wait(lambda: "ready" in server.out.read_text())
    ready, curl = server.out.read_text().splitlines()
    assert server.url in ready
    assert "demo" in curl
    assert server.get("/readyz")[0] == 200
    assert server.complete() == 3
    first = server.worker()

    os.kill(first, signal.SIGKILL)
    server.wait(lambda: server.worker() not in (None, first))
    server.wait(lambda: server.get("/readyz")[0] == 200)
    assert server.complete() == 3
    page = server.get("/metrics")[1]
    assert re.search(r"^quire_gateway_worker_restarts_total 1\.0$", page, re.MULTILINE)
    assert re.search(r'^vllm:generation_tokens_total\{.*model_name="demo".*\} 3\.0$', page, re.M)

    second = server.worker()
    assert server.end() == 0
    assert gone(second)
    assert not list(server.folder.glob("quire-*")), "the socket's folder is removed"
    assert "Traceback" not in server.err.read_text()


def test_a_worker_does_not_outlive_a_server_that_is_killed(serve):
    server = serve("demo")
    server.wait(lambda: server.get("/readyz")[0] == 200 if server.is_open() else False)
    worker = server.worker()
    server.end(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not gone(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def open_stream(server, tokens):
    fields = {"model": "demo", "prompt": "x", "max_tokens": tokens, "stream": True}
    body = json.dumps({**fields, "ignore_eos": True}).encode()
    stream = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    stream.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    first = stream.recv(65536)
    assert b" 200 " in first
    return stream, first


def test_a_signal_lets_streams_finish_and_refuses_new_ones(serve):
    server = serve("demo")
    server.wait(lambda: server.get("/readyz")[0] == 200 if server.is_open() else False)
    stream, received = open_stream(server, 200)
    server.process.send_signal(signal.SIGINT)
    server.wait(lambda: not server.is_open(), 10)
    with stream:
        while part := stream.recv(65536):
            received += part
    assert b"[DONE]" in received
    assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(serve):
    server = serve("demo")
    server.wait(lambda: server.get("/readyz")[0] == 200 if server.is_open() else False)
    worker = server.worker()
    stream, _ = open_stream(server, 1900)
    with stream:
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: not server.is_open(), 10)
        began = time.monotonic()
        assert server.end(signal.SIGTERM) == 130
        assert time.monotonic() - began < 3
    assert gone(worker)


def test_a_signal_during_the_start_leaves_nothing_behind(serve):
    server = serve("demo")
    server.wait(lambda: server.worker() is not None)
    worker = server.worker()
    assert server.end() in (0, 143)
    deadline = time.monotonic() + 20
    while not gone(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(server.folder.glob("quire-*"))
    assert "Traceback" not in server.err.read_text()


def test_a_model_that_is_not_there_ends_the_server_with_one_line_and_code_2(serve, tmp_path):
    server = serve(str(tmp_path / "nothing"))
    assert server.process.wait(START_S) == 2
    (line,) = server.err.read_text().splitlines()
    assert line.startswith("quire: error: no model folder at")
    assert server.out.read_text() == ""


def test_a_taken_port_is_one_line_and_code_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "quire", "serve", "--port", str(port)],
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line


def test_the_greeting_is_a_command_that_works():
    ready, curl = greeting(GatewayConfig(port=81), "it's", 1.25).splitlines()
    assert ready == "quire: it's is ready at http://127.0.0.1:81 (1.2 s)"
    assert curl.startswith("curl http://127.0.0.1:81/v1/chat/completions")
    assert "it'\"'\"'s" in curl, "quoted for the shell"
    keyed = greeting(GatewayConfig(api_key=("sk-1",)), "m", 1)
    assert "$QUIRE_API_KEY" in keyed
    assert "sk-1" not in keyed
    assert "--unix-socket /run/q.sock" in greeting(GatewayConfig(uds="/run/q.sock"), "m", 1)
