"""The worker's gRPC service without an engine: plays a script for every request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from quire.proto import worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from quire.gateway.fake_worker import Script


class FakeServicer(worker_pb2_grpc.WorkerServicer):
    """Watch sends `startup` until `model` is set. Every submit, abort and lost session is noted."""

    def __init__(self, model: worker_pb2.ModelInfo | None, script: Script) -> None:
        self.model = model
        self.script = script
        self.startup = worker_pb2.Startup(phase="load", done=1, total=4, unit="shards")
        self.submitted: list[worker_pb2.Submit] = []
        self.aborted: list[int] = []
        self.sessions = 0
        self.end_watch = asyncio.Event()
        self.end_session = asyncio.Event()
        self.step_age_s = 0.0
        self.hold_watch = asyncio.Event()
        """Set: Watch says nothing, as if the process was stopped."""

    async def Watch(self, request, context):
        while self.model is None:
            yield worker_pb2.WorkerUpdate(startup=self.startup)
            await asyncio.sleep(0.05)
        yield worker_pb2.WorkerUpdate(model=self.model)
        while not self.end_watch.is_set():
            if not self.hold_watch.is_set():
                load = worker_pb2.Load(
                    step=1, running=len(self.submitted), step_age_s=self.step_age_s
                )
                yield worker_pb2.WorkerUpdate(load=load)
            await asyncio.sleep(0.1)

    async def Session(self, request_iterator, context):
        self.sessions += 1
        replies: asyncio.Queue[worker_pb2.SessionReply | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, replies))
        ender = asyncio.create_task(self._end(replies))
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            reader.cancel()
            ender.cancel()

    async def Control(self, request, context):
        return worker_pb2.ControlReply(ok=True, metrics="# TYPE quire_fake gauge\nquire_fake 1.0\n")

    async def _end(self, replies):
        await self.end_session.wait()
        replies.put_nowait(None)

    async def _read(self, requests, replies):
        playing: dict[int, asyncio.Task] = {}
        try:
            async for message in requests:
                if message.HasField("submit"):
                    submit = message.submit
                    self.submitted.append(submit)
                    playing[submit.request] = asyncio.create_task(self._play(submit, replies))
                elif not message.abort.HasField("choice"):
                    self.aborted.append(message.abort.request)
                    playing[message.abort.request].cancel()
        finally:
            for task in playing.values():
                task.cancel()

    async def _play(self, submit, replies):
        async for item in self.script(submit):
            item.request = submit.request
            reply = worker_pb2.SessionReply()
            if isinstance(item, worker_pb2.Failure):
                reply.failure.CopyFrom(item)
            else:
                reply.batch.outputs.append(item)
            replies.put_nowait(reply)


async def start(servicer: FakeServicer, address: str) -> grpc.aio.Server:
    """Serve it."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    return server
