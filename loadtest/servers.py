"""`quire serve` in several shapes, measured in turn: each in a process group of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

from loadtest.compare.process import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

START_S = 180
POLL_S = 0.2


class QuireServer:
    """A server and its workers. Starts on construction; `wait_ready` before the first request."""

    def __init__(self, name: str, model: str, flags: Sequence[str]) -> None:
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "quire", "serve", model, "--port", str(port)]
        command += [*flags, "--log-level", "error"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, start_new_session=True, text=True
        )
        self.group = Frozen(process)

    def wait_ready(self) -> None:
        """Until all of its workers are. Raises RuntimeError when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.group.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/startupz", timeout=10) as reply,
            ):
                progress = json.load(reply)
                if progress["workers_ready"] == progress["workers"]:
                    return
            time.sleep(POLL_S)
        raise RuntimeError(f"{self.name} did not become ready")

    def close(self) -> None:
        """End it."""
        self.group.end()
