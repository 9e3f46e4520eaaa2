"""`quire serve --ray`: workers on a Ray of the server's own, which end with it.

Slow: `pytest -m slow tests/integration/test_ray_serve.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server import running_server
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FLAGS = ("--ray", "--replicas", "2", "--num-threads", "1", "--kv-cache-memory-bytes", "32M")
BODY = {"model": "demo", "prompt": "import os\ndef ", "max_tokens": 40, "seed": 3}


def processes(*words: str) -> list[int]:
    """Of this machine, whose command line has all these words."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [int(entry.name)] * all(word in line for word in words)
    return found


def test_a_killed_coordinator_is_not_noticed_and_everything_ends_with_the_server():
    with running_server(*FLAGS, "--max-model-len", "512") as server:
        fleet = f"/serve-{server.port}/"
        wait_until(lambda: server.metric("quire_gateway_worker_up") == 2)
        engines = processes("quire worker", fleet)
        assert len(engines) == 2
        want = server.post("/v1/completions", BODY)["choices"][0]["text"]

        def coordinator() -> list[int]:
            return [pid for pid in server.pids() if pid in processes("quire.coordinator")]

        [before] = coordinator()
        os.kill(before, signal.SIGKILL)
        for _ in range(20):
            assert server.post("/v1/completions", BODY)["choices"][0]["text"] == want
        wait_until(lambda: coordinator() not in ([], [before]))
        wait_until(lambda: len(processes("quire.coordinator.keeper", fleet)) == 2)
        assert processes("quire worker", fleet) == engines
        assert server.post("/v1/completions", BODY)["choices"][0]["text"] == want
    wait_until(lambda: not processes("quire worker", fleet), "they end", 60)


def test_a_server_whose_replicas_are_all_refused_ends_with_the_reason():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--ray", "--port", str(port), "--num-threads", "1", "--kv-cache-memory-bytes", "4096"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quire", "serve", *flags],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("quire: error: ")]
    assert "is refused: " in said
    assert "--kv-cache-memory-bytes" in said
    assert processes(f"/serve-{port}/") == []
