"""A gateway, a router, a prefill worker and two decode workers, each a process to be killed and
stopped; a pod that is gone is started again at once, in the same place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from server import Server
from waiting import LIMIT_S, until
from workers import WorkerProcess

from quire.proto import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

ROLES = {"prefill": "prefill", "decode-1": "decode", "decode-2": "decode"}
ROUTER = "router"
SILENCE_S = 1.0
"""How long a gateway bears a worker that says nothing."""


class Fleet:
    """`start` it, use it, `stop` it. `engines`: options by role; `environment`: of the workers."""

    def __init__(
        self, folder: Path, engines: dict[str, dict], transfer: dict, environment: dict[str, str]
    ) -> None:
        self.folder = folder
        self._engines, self._transfer, self._environment = engines, transfer, environment
        self.workers: dict[str, WorkerProcess] = {}
        self._models: dict[str, worker_pb2.ModelInfo] = {}
        self._router: subprocess.Popen | None = None
        self.gateway: Server | None = None
        self.is_sound = False
        """Whoever used it last was through with it."""

    # ---- life

    async def start(self) -> None:
        """Everything, until the router sends requests to all."""
        for name in ROLES:
            self._start_worker(name)
        self._start_router()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        flags = ("--port", str(port), "--worker-silence", str(SILENCE_S))
        process = _quire("gateway", *flags, *self._pods("--worker"), "--router", self._router_at)
        self.gateway = Server(port, process)
        await asyncio.to_thread(self.gateway.wait_ready)
        await self.whole()

    async def stop(self) -> None:
        """Everything, at once."""
        for process in (self.gateway.process if self.gateway else None, self._router):
            if process is not None:
                process.kill()
                process.wait(10)
        for worker in self.workers.values():
            worker.kill()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))

    async def whole(self) -> None:
        """Every process is there, and the others know it."""
        for name, worker in self.workers.items():
            self._models[name] = await worker.ready()
        async with asyncio.timeout(LIMIT_S):
            while not await self._is_whole():
                await asyncio.sleep(0.05)

    def pid(self, name: str) -> int:
        """Of a worker or the router."""
        return (self._router if name == ROUTER else self.workers[name].process).pid

    def named(self, pid: int) -> str:
        """The worker that a process is."""
        return next(name for name in self.workers if self.pid(name) == pid)

    def incarnated(self, incarnation: int) -> str:
        """The worker that has it."""
        return next(n for n, model in self._models.items() if model.incarnation == incarnation)

    # ---- harm

    async def hit(self, name: str, number: int) -> None:
        """Send a signal that kills or stops, and see it do so."""
        os.kill(self.pid(name), number)
        await self.down(name)

    async def down(self, name: str) -> None:
        """It is stopped, or dead."""
        status = Path(f"/proc/{self.pid(name)}/stat")
        await until(lambda: status.read_text().rpartition(")")[2].split()[0] in "TZ", "it is down")

    async def recover(self, name: str) -> None:
        """What is stopped goes on, what is dead is started again."""
        process = self._router if name == ROUTER else self.workers[name].process
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
        elif name == ROUTER:
            self._start_router()
        else:
            await self.workers[name].stop()
            self._start_worker(name)

    # ---- what is there

    async def forget(self) -> None:
        """Empty every prefix cache."""
        reset = worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache())
        for worker in self.workers.values():
            await worker.stub.Control(reset, timeout=10)

    async def released(self) -> None:
        """Until no worker has a request, a block that is owned, or one that is promised."""
        for worker in self.workers.values():
            await worker.wait_released()
            assert await worker.metric("quire_kv_promised_blocks") == 0, worker.name

    async def quarantined(self) -> dict[str, float]:
        """Worker -> bytes that a one-sided write may still reach."""
        workers = self.workers.items()
        return {n: await w.metric("quire_kv_quarantined_bytes") for n, w in workers}

    async def _is_whole(self) -> bool:
        """The gateway has all workers, and a router decides that knows them."""
        up = await asyncio.to_thread(self.gateway.metric, "quire_gateway_worker_up")
        if up < len(ROLES):
            return False
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        answer = await asyncio.to_thread(self.gateway.post, "/v1/completions", body)
        page = await asyncio.to_thread(self.gateway.get, f"/v1/requests/{answer['id']}/trace")
        routing = json.loads(page)["prompts"][0]["routing"]
        return bool(routing) and len(routing[0]["scores"] or ()) == len(ROLES)

    # ----

    @property
    def _router_at(self) -> str:
        return f"unix:{self.folder}/router.sock"

    def _pods(self, flag: str) -> list[str]:
        named = [f"{name}=unix:{self.folder}/{name}.sock" for name in ROLES]
        return [word for pod in named for word in (flag, pod)]

    def _start_worker(self, name: str) -> None:
        (self.folder / f"{name}.sock").unlink(missing_ok=True)
        role = ROLES[name]
        self.workers[name] = WorkerProcess(
            self.folder,
            name,
            self._engines[role],
            self._transfer,
            role=role,
            environment=self._environment,
        )

    def _start_router(self) -> None:
        (self.folder / "router.sock").unlink(missing_ok=True)
        # by cost, prompts this short would stay where they are decoded
        policy = ("--routing-policy", "least_load")
        self._router = _quire("router", "--listen", self._router_at, *policy, *self._pods("--pod"))


def _quire(*words: str) -> subprocess.Popen:
    command: Sequence[str] = (sys.executable, "-P", "-m", "quire", *words, "--log-level", "warning")
    return subprocess.Popen(command)
