"""Workers inside the test's own process, over their real wire: their pools can be looked into."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from workers import ask

from quire.engine.engine import Engine
from quire.proto import worker_pb2_grpc
from quire.telemetry import metrics as m
from quire.telemetry.instruments import new_registry
from quire.worker.disaggregation import TransferOptions
from quire.worker.metrics import EngineMetrics
from quire.worker.servicer import WorkerService

if TYPE_CHECKING:
    from pathlib import Path

    from workers import Answer

    from quire.config.engine import EngineConfig
    from quire.config.transfer import TransferConfig
    from quire.proto import worker_pb2

IDLE_S = 15.0
POLL_S = 0.005


class LocalWorker:
    """A worker on a Unix socket in `folder`. Start and stop it on the event loop that uses it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.address = f"unix:{folder}/{name}.sock"

    async def start(self, config: EngineConfig, transfer: TransferConfig | None) -> LocalWorker:
        registry = new_registry("engine", engine=self.name)
        instruments = m.engine_instruments(registry, model_name="demo", engine=self.name)
        self.service = WorkerService(EngineMetrics(instruments), registry)
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self.service, self.server)
        self.server.add_insecure_port(self.address)
        await self.server.start()
        self.engine = await asyncio.to_thread(Engine.load, config, lambda _: None)
        options = None if transfer is None else TransferOptions(self.name, transfer)
        self.loop = self.service.attach(self.engine, options)
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)
        return self

    async def ask(self, submits: list[worker_pb2.Submit]) -> list[Answer]:
        """Answers of requests that share one session."""
        return await ask(self, submits)

    async def idle(self) -> None:
        """Until no request is there and no block is owned or promised."""
        async with asyncio.timeout(IDLE_S):
            while True:
                state, counts = self.loop.state, self.engine.pool.counts()
                if not (state.running or state.waiting or counts.owned or counts.promised):
                    return
                await asyncio.sleep(POLL_S)

    def cached(self) -> dict[bytes, bytes]:
        """Content of every block that the prefix cache knows, by hash. Of an idle worker."""
        pool = self.engine.model.runner.backend.host_pool()
        return {h: pool[block].tobytes() for h, block in self.engine.pool._by_hash.items()}

    async def stop(self) -> None:
        await self.channel.close()
        await self.service.detach()
        self.loop.stop(10)
        await self.server.stop(0.1)
