"""A real `quire serve`: gateway and worker as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

START_S = 120


@dataclass
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict) -> dict:
        return json.loads(self.send(path, body))

    def send(self, path: str, body: dict, headers: dict[str, str] | None = None) -> bytes:
        """POST; whatever comes back, to its end."""
        data = json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, data, all_headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def metric(self, name: str) -> float:
        """The one sample whose line starts with `name`."""
        [line] = [x for x in self.get("/metrics").splitlines() if x.startswith(name)]
        return float(line.rsplit(" ", 1)[1])

    def pids(self) -> list[int]:
        """The gateway's process and its worker's."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def worker_pid(self, number: int) -> int:
        """The process that listens on the worker's socket."""
        for pid in self.pids()[1:]:
            inodes = set()
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    inodes.add(str(fd.readlink()))
            for line in Path("/proc/net/unix").read_text().splitlines():
                is_its = line.endswith(f"/worker-{number}.sock")
                if is_its and f"socket:[{line.split()[6]}]" in inodes:
                    return pid
        raise AssertionError(f"worker {number} is not there")

    def resident_bytes(self) -> list[int]:
        """Resident memory of each process."""
        page = os.sysconf("SC_PAGE_SIZE")
        return [int(Path(f"/proc/{p}/statm").read_text().split()[1]) * page for p in self.pids()]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                self.get("/readyz")
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise AssertionError("the server did not become ready")


@contextlib.contextmanager
def running_server(*flags: str, log: Path | None = None):
    """`quire serve` with flags on a free port, stopped in the end; `log` gets what it and its
    children say."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "quire", "serve", "--port", str(port), *flags]
    with contextlib.nullcontext() if log is None else log.open("wb") as errors:
        process = subprocess.Popen(command, start_new_session=True, stderr=errors)
    server = Server(port, process)
    try:
        server.wait_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
