"""Workers come and go while requests run: none is lost, none goes where it should not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from quire.gateway import workers as module
from quire.gateway.continuation import Patience
from quire.gateway.fake_worker import FakeWorker, speak
from quire.gateway.worker import Loss
from quire.gateway.workers import Joining, Workers
from quire.proto import common_pb2, worker_pb2
from quire.router.discovery import StaticPods

TOKENS = list(range(100, 130))
MODEL = worker_pb2.ModelInfo(model="m", fingerprint=b"f")


class World:
    """Discovered pods, each a fake worker by name and address."""

    def __init__(self, *names: str) -> None:
        self.discovery = StaticPods({name: f"{name}:1" for name in names})
        self.made: dict[tuple[str, str], FakeWorker] = {}
        self.losses: list[Loss] = []
        self.workers = Workers(
            [], Patience(wait_s=5.0), on_resubmission=lambda loss, _: self.losses.append(loss)
        )
        self.workers.follow(Joining(self.discovery, self.connect))

    def connect(self, name: str, address: str) -> FakeWorker:
        fake = FakeWorker(MODEL, speak(TOKENS, delay_s=0.01), name=name)
        self.made[name, address] = fake
        return fake


@asynccontextmanager
async def world(*names: str):
    one = World(*names)
    running = asyncio.create_task(one.workers.run())
    try:
        async with asyncio.timeout(10):
            while len(one.workers.all) < len(names):
                await asyncio.sleep(0)
        yield one
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def answer(workers: Workers) -> list[int]:
    submit = worker_pb2.Submit(prompt_token_ids=[1, 2, 3], request_id="r")
    submit.sampling.n, submit.sampling.max_tokens, submit.sampling.seed = 1, len(TOKENS), 7
    tokens: list[int] = []
    async with workers.submit([submit]) as replies, asyncio.timeout(10):
        while True:
            for _, output in await replies.next():
                assert output.position == len(tokens)
                tokens += output.token_ids
                if output.finish_reason == common_pb2.FINISH_REASON_LENGTH:
                    return tokens


async def test_nobody_is_there_until_somebody_is_discovered():
    async with world() as one:
        assert not one.workers.ready
        assert one.workers.startup.phase == "discover"
        one.discovery.set({"a": "a:1"})
        await asyncio.wait_for(one.workers.wait_ready(), 5)
        assert await answer(one.workers) == TOKENS


async def test_a_worker_that_leaves_hands_its_requests_over():
    async with world("a", "b") as one:
        running = asyncio.create_task(answer(one.workers))
        while not any(fake.submitted for fake in one.made.values()):
            await asyncio.sleep(0.001)
        [busy] = [name for (name, _), fake in one.made.items() if fake.submitted]
        [other] = {"a", "b"} - {busy}
        one.discovery.set({other: f"{other}:1"})
        assert await running == TOKENS
        assert one.losses == [Loss.DRAINING]
        assert [worker.name for worker in one.workers.all] == [other]


async def test_the_only_worker_finishes_what_it_has_after_leaving():
    async with world("a") as one:
        running = asyncio.create_task(answer(one.workers))
        while not one.made["a", "a:1"].submitted:
            await asyncio.sleep(0.001)
        one.discovery.set({})
        assert await running == TOKENS
        assert one.losses == []
        assert not one.workers.ready


async def test_a_request_stays_with_its_model_when_another_one_takes_over():
    async with world("a", "b") as one:
        running = asyncio.create_task(answer(one.workers))
        while not any(fake.submitted for fake in one.made.values()):
            await asyncio.sleep(0.001)
        [busy] = [name for (name, _), fake in one.made.items() if fake.submitted]
        [other] = {"a", "b"} - {busy}
        one.made[other, f"{other}:1"].model = worker_pb2.ModelInfo(model="m", fingerprint=b"new")
        one.discovery.set({other: f"{other}:1"})
        assert await running == TOKENS
        assert one.losses == []
        assert not one.made[other, f"{other}:1"].submitted


async def test_a_worker_at_another_address_is_another_worker():
    async with world("a") as one:
        one.discovery.set({"a": "a:2"})
        while ("a", "a:2") not in one.made:
            await asyncio.sleep(0.001)
        assert await answer(one.workers) == TOKENS
        assert one.made["a", "a:2"].submitted
        assert not one.made["a", "a:1"].submitted


async def test_the_connection_of_one_that_left_is_closed_once_it_is_idle(monkeypatch):
    monkeypatch.setattr(module, "LINGER_S", 0.01)
    async with world("a", "b") as one:
        one.discovery.set({"b": "b:1"})
        async with asyncio.timeout(5):
            while one.workers._leaving or len(one.workers.all) > 1:
                await asyncio.sleep(0.01)
        assert await answer(one.workers) == TOKENS
