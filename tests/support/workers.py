"""Real worker processes, driven over their real wire without a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc

from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

START_S = 120
IN_WORKER = Path(__file__).parent / "in_worker"


class WorkerProcess:
    """`python -m quire.worker` on a socket in `folder`, with a role. `environment`: its own
    variables, those of what is changed in it among them, see `in_worker`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        engine: dict,
        transfer: dict | None = None,
        *,
        role: str = "both",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.address = f"unix:{folder}/{name}.sock"
        path = os.pathsep.join(filter(None, (str(IN_WORKER), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire.worker"],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path} | environment,
        )
        options = {"engine": engine, "listen": self.address, "worker": name, "transfer": transfer}
        options |= {"role": role, "log_level": os.environ.get("QUIRE_TEST_LOG", "warning")}
        self.process.stdin.write(json.dumps(options).encode() + b"\n")
        self.process.stdin.flush()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = WorkerStub(self.channel)

    async def ready(self) -> worker_pb2.ModelInfo:
        call = self.stub.Watch(worker_pb2.WatchRequest(), wait_for_ready=True, timeout=START_S)
        try:
            async for update in call:
                if update.HasField("model"):
                    return update.model
        finally:
            call.cancel()
        raise AssertionError("the worker ended")

    async def load(self) -> worker_pb2.Load:
        call = self.stub.Watch(worker_pb2.WatchRequest(), timeout=10)
        try:
            async for update in call:
                if update.HasField("load"):
                    return update.load
        finally:
            call.cancel()
        raise AssertionError("no load")

    async def wait_released(self, timeout_s: float = 15.0) -> worker_pb2.Load:
        """Until no request is there and no block is owned or promised."""
        async with asyncio.timeout(timeout_s):
            while True:
                load = await self.load()
                held = load.blocks_owned or await self.metric("quire_kv_promised_blocks")
                if not (load.running or load.waiting or held):
                    return load
                await asyncio.sleep(0.05)

    async def metric(self, name: str) -> float:
        request = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())
        page = (await self.stub.Control(request, timeout=10)).metrics
        return sum(float(x.rsplit(" ", 1)[1]) for x in page.splitlines() if x.startswith(name))

    def shares_memory(self) -> bool:
        """Its UCX has memory in common with another process, by which it reaches that."""
        return "/dev/shm/ucx_" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    async def stop(self) -> None:
        await self.channel.close()
        self.process.stdin.close()
        try:
            await asyncio.to_thread(self.process.wait, 20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Answer:
    """What a session got for one request."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[tuple]] = {}
        self.ended: dict[int, int] = {}
        self.failure: worker_pb2.Failure | None = None
        self.admission: worker_pb2.Admission | None = None

    def take(self, output: worker_pb2.ChoiceOutput) -> None:
        tokens = self.tokens.setdefault(output.choice, [])
        assert output.position == len(tokens), "a token is missing or repeated"
        assert output.choice not in self.ended, "a choice went on after its end"
        if output.HasField("admission"):
            self.admission = output.admission
        tokens.extend(output.token_ids)
        self.logprobs.setdefault(output.choice, []).extend(
            (p.logprob, p.rank, tuple(p.top_ids), tuple(p.top_logprobs)) for p in output.logprobs
        )
        if output.finish_reason:
            self.ended[output.choice] = output.finish_reason


async def ask(
    worker: WorkerProcess, submits: Iterable[worker_pb2.Submit], timeout_s: float = 60
) -> list[Answer]:
    """Send requests over one session and read their answers."""
    submits = list(submits)
    answers = {s.request: Answer() for s in submits}
    wanted = sum(s.sampling.n for s in submits)
    call = worker.stub.Session(timeout=timeout_s)
    try:
        for submit in submits:
            await call.write(worker_pb2.SessionRequest(submit=submit))
        ended = 0
        while ended < wanted:
            reply = await call.read()
            assert reply is not grpc.aio.EOF, "the session ended"
            if reply.HasField("failure"):
                answers[reply.failure.request].failure = reply.failure
                ended += next(s.sampling.n for s in submits if s.request == reply.failure.request)
            for output in reply.batch.outputs:
                answers[output.request].take(output)
                ended += bool(output.finish_reason)
    finally:
        call.cancel()
    return list(answers.values())


@asynccontextmanager
async def workers(folder: Path, *names: str, engine: dict, transfer: dict | None):
    """Worker processes by name, ready; stopped in the end."""
    processes = [WorkerProcess(folder, name, engine, transfer) for name in names]
    try:
        await asyncio.gather(*(process.ready() for process in processes))
        yield processes
    finally:
        await asyncio.gather(*(process.stop() for process in processes))
