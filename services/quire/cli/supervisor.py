"""Keeps one worker process alive: starts it, restarts it when it dies, ends it with the server.

    start ──▶ starting ──ready──▶ serving
      ▲          │ dies             │ dies
      └──wait────┴──────────────────┘        1, 2, 4 ... 30 s; back to 1 s after a calm minute
                 │ says why it cannot start (exit code 2), or fails too often before it is ready
                 ▼
              given up: the server ends with the worker's exit code

A worker that was ready and does not answer its probe any more is killed: one that is stopped, or
whose event loop hangs, would never die.

The worker's options go to its stdin as one line of JSON, so that they are not in the process list.
Its stdin stays open: it ends by itself when this process is gone, however that happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config.exit_codes import CANNOT_SERVE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from quire.cli.probe import Probe

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 100
"""Bytes of a Unix socket's path that every system accepts."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, how often to try. Seconds."""

    first_delay: float = 1.0
    longest_delay: float = 30.0
    calm: float = 60.0
    """A worker that was ready for this long starts over with the first delay."""
    start_attempts: int = 4
    """Deaths in a row before being ready, after which starting is given up."""
    stop: float = 15.0
    """For the worker to end by itself once its stdin is closed."""
    terminate: float = 3.0
    """For it to end after SIGTERM; then it is killed."""
    probe_every: float = 1.0
    probe_misses: int = 4
    """Probes in a row that a worker may leave unanswered, each for two seconds. Counted, so that
    nothing is blamed on the worker when this process itself was stopped."""


@dataclass
class Supervisor:
    """One worker. `run` in a task; `ready` and `stop` from the same event loop."""

    options: Mapping[str, Any]
    """What the worker reads from its stdin."""
    socket: Path
    """Unix socket it listens on."""
    on_restart: Callable[[], None] = lambda: None
    patience: Patience = field(default_factory=Patience)
    command: Sequence[str] = (sys.executable, "-P", "-m", "quire.worker")
    name: str = "the worker"
    """In logs."""
    probe: Probe | None = None
    """How to ask whether it lives."""
    _process: subprocess.Popen[bytes] | None = None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _ready_since: float | None = None

    async def run(self) -> int:
        """Keep the worker alive until `stop`; returns 0 then, and else why it was given up.

        The result is never 0 unless `stop` was called.
        """
        delay, failed_starts = self.patience.first_delay, 0
        while True:
            code = await self._run_once()
            if self._stopping.is_set():
                return 0
            if self._ready_since is None:
                failed_starts += 1
                if code == CANNOT_SERVE:
                    return code
                if failed_starts >= self.patience.start_attempts:
                    logger.error("%s cannot start (%s); giving up", self.name, _died(code))
                    return code if code > 0 else 1
            else:
                failed_starts = 0
                if time.monotonic() - self._ready_since >= self.patience.calm:
                    delay = self.patience.first_delay
            logger.error("%s died (%s); starting it again in %g s", self.name, _died(code), delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()
            if self._stopping.is_set():
                return 0
            delay = min(2 * delay, self.patience.longest_delay)
            self.on_restart()

    def ready(self) -> None:
        """The worker has loaded its model: from here on, dying is not a failure to start."""
        if self._ready_since is None:
            self._ready_since = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The worker's process id, None between two workers."""
        return self._process.pid if self._process is not None else None

    async def stop(self) -> None:
        """End the worker, by force if it does not listen. `run` returns afterwards."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        _close_stdin(process)
        if not await _ended(process, self.patience.stop):
            logger.warning("%s does not end by itself; terminating it", self.name)
            process.terminate()
            if not await _ended(process, self.patience.terminate):
                process.kill()

    def kill(self) -> None:
        """End the worker now."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    async def _run_once(self) -> int:
        """One worker from its start to its end; returns its exit code, negative for a signal."""
        self._ready_since = None
        process = self._process = self._spawn()
        watching = asyncio.create_task(self._watch(process))
        try:
            # A thread per worker: the loop's own child watching differs between loops.
            return await asyncio.to_thread(process.wait)
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            watching.cancel()
            if self.probe is not None:
                await self.probe.close()
            _close_stdin(process)
            self._process = None

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a worker that was ready and shows no sign of life any more."""
        if self.probe is None:
            return
        missed = 0
        while missed < self.patience.probe_misses:
            await asyncio.sleep(self.patience.probe_every)
            if self._ready_since is not None and not self._stopping.is_set():
                missed = 0 if await self.probe() else missed + 1
        logger.error("%s does not answer any more; killing it", self.name)
        process.kill()

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.socket.unlink(missing_ok=True)
        # A session of its own: Ctrl-C in the terminal is for the server, which drains first.
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(self.options).encode() + b"\n")
            process.stdin.flush()
        return process


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder for Unix sockets that only this user can enter; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="quire-"))  # mode 0700
    try:
        if len(bytes(folder)) > MAX_SOCKET_PATH - len("/worker-999.sock"):
            shutil.rmtree(folder)
            folder = Path(tempfile.mkdtemp(prefix="quire-", dir="/tmp"))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _close_stdin(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


async def _ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _died(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
