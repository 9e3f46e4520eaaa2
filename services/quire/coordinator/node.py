"""A host of a Ray cluster as one process tree: the first process of a pod.

    start Ray ──ends──▶ again after 0.5, 1 ... 30 s: engines run on, the next supervisors adopt them
    SIGTERM ──▶ Ray ends, and with it the supervisors ──▶ engines drain and end ──▶ exit code 0
              once more: engines end now

Ray goes first, or a supervisor would start an engine again that has drained. Ray's processes and
the engines' keepers, which outlive whoever started them, become children of this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from quire.coordinator import engine_process, files
from quire.coordinator.back_off import next_delay_s
from quire.coordinator.engine_logs import EngineLogs
from quire.coordinator.joining import NICENESS, NODE_NAME, OBJECT_STORE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.node import NodeConfig
    from quire.coordinator.engine_process import Engine

logger = logging.getLogger(__name__)

POLL_S = 0.2
RAY_END_S = 2.0
"""For Ray to tell its head. It would then wait for what runs here, and that would never end."""
RECONNECT_S = 600
"""For how long Ray here waits for a head that is away."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_PR_SET_CHILD_SUBREAPER = 36
_REDIS_PASSWORD = "RAY_REDIS_PASSWORD"
"""Beside RAY_REDIS_ADDRESS, which Ray reads itself."""


def start_command(config: NodeConfig) -> list[str]:
    """Ray's own command line for this node. It ends when a part of Ray does."""
    role = _head_options(config) if config.join is None else [f"--address={config.join}"]
    own = [] if config.address is None else [f"--node-ip-address={config.address}"]
    labels = [f"--labels={','.join(config.node_label)}"] if config.node_label else []
    return [
        sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *role, *own, *labels,
        f"--num-cpus={config.cpus}", f"--num-gpus={config.gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip


def _head_options(config: NodeConfig) -> list[str]:
    shown = str(config.dashboard).lower()
    options = ["--head", f"--port={config.ray_port}", f"--include-dashboard={shown}"]
    if config.dashboard and config.address is not None:
        options.append(f"--dashboard-host={config.address}")
    return options


class Node:
    """Call `run` once, from the main thread."""

    def __init__(self, config: NodeConfig) -> None:
        self._command = start_command(config)
        if config.join is None and (password := os.environ.get(_REDIS_PASSWORD)):
            self._command.append(f"--redis-password={password}")
        self._environment = dict(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in (
            ("RAY_AUTH_MODE", "token"),
            ("RAY_gcs_rpc_server_reconnect_timeout_s", str(RECONNECT_S)),
            NICENESS,
        ):
            self._environment.setdefault(name, value)
        if config.node_name is not None:
            self._environment[NODE_NAME] = config.node_name
        self._logs = EngineLogs(sys.stdout.buffer)
        self._ray: int | None = None
        """Process id."""
        self._times_asked = 0
        """To end."""

    def run(self) -> int:
        """Until SIGTERM or SIGINT; returns the exit code."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        delay_s = 0.0
        while not self._times_asked:
            began = time.monotonic()
            self._start_ray()
            self._wait(math.inf, lambda: self._ray is None or self._times_asked > 0)
            if not self._times_asked:
                self._kill_rest_of_ray()
                delay_s = next_delay_s(delay_s, time.monotonic() - began)
                logger.warning("Ray has ended: starting it again in %g s", delay_s)
                self._wait(delay_s, lambda: self._times_asked > 0)
        self._end_ray()
        self._end_engines()
        return 0

    def _start_ray(self) -> None:
        self._ray = os.posix_spawn(
            self._command[0], self._command, self._environment, setsigmask=(), setsid=True
        )

    def _wait(self, limit_s: float, until: Callable[[], bool]) -> None:
        """Take in what children and signals say, until something holds or time is up."""
        deadline = time.monotonic() + limit_s
        while not until() and (left_s := deadline - time.monotonic()) > 0:
            got = signal.sigtimedwait(_SIGNALS, min(left_s, POLL_S))
            if got is not None and got.si_signo != signal.SIGCHLD:
                self._times_asked += 1
            self._reap()
            self._logs.copy()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                if pid == self._ray:
                    self._ray = None

    def _end_ray(self) -> None:
        logger.info("ending Ray here, then the engines")
        if self._ray is not None:
            os.kill(self._ray, signal.SIGTERM)
        self._wait(RAY_END_S, lambda: self._ray is None)
        self._kill_rest_of_ray()

    def _kill_rest_of_ray(self) -> None:
        """Every child but the engines' keepers: parts of Ray whose parent has died."""
        kept = {engine.keeper.pid for engine in _engines()}
        for pid in _children():
            if pid not in kept:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _end_engines(self) -> None:
        asked = self._times_asked
        for engine in _engines():
            logger.info("draining the engine at %s", engine.address)
            engine_process.drain(engine)
        self._wait(math.inf, lambda: not _engines() or self._times_asked > asked)
        for engine in _engines():
            engine_process.kill(engine)


def _engines() -> list[Engine]:
    found = map(engine_process.find, files.engine_folders())
    return [engine for engine in found if engine is not None]


def _children() -> list[int]:
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in own.read_text().split()]
