"""A coordinator's topology is followed; without the coordinator, the last one stays."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.config.discovery import DiscoveryConfig
from quire.proto import coordinator_pb2, coordinator_pb2_grpc
from quire.router import coordinated
from quire.router.coordinated import discover
from quire.router.discovery import StaticPods


class FakeCoordinator(coordinator_pb2_grpc.CoordinatorServicer):
    """Says what it is told to say."""

    def __init__(self) -> None:
        self.said: asyncio.Queue = asyncio.Queue()

    async def Watch(self, request, context):
        while True:
            topology = await self.said.get()
            if topology is None:
                return
            yield topology

    def say(self, term: int, version: int, fleet: str = "f", **pods: str) -> None:
        pods = [coordinator_pb2.Pod(name=name, address=at) for name, at in pods.items()]
        self.said.put_nowait(
            coordinator_pb2.Topology(fleet=fleet, term=term, version=version, pods=pods)
        )


@asynccontextmanager
async def serving(service: FakeCoordinator, address: str = "127.0.0.1:0", token: str = "t"):
    cluster = Cluster(ClusterConfig(cluster_token=token))
    server = cluster.server()
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
    port = cluster.bind(server, address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def reader(address: str, **beside: str):
    config = DiscoveryConfig(coordinator=address)
    return discover(config, beside, Cluster(ClusterConfig(cluster_token="t"))).watch()


async def next_of(watch):
    return await asyncio.wait_for(anext(watch), 10)


async def test_changes_are_told_with_the_pods_that_are_named():
    service = FakeCoordinator()
    async with serving(service) as address:
        watch = reader(address, fixed="h:9")
        assert await next_of(watch) == {"fixed": "h:9"}
        service.say(1, 1, a="h:1")
        assert await next_of(watch) == {"fixed": "h:9", "a": "h:1"}
        service.say(1, 2)
        assert await next_of(watch) == {"fixed": "h:9"}
        await watch.aclose()


async def test_a_stale_epoch_is_refused(caplog):
    service = FakeCoordinator()
    async with serving(service) as address:
        watch = reader(address)
        service.say(7, 1, a="h:1")
        assert await next_of(watch) == {"a": "h:1"}
        service.say(6, 99)  # of a coordinator that another one has taken over from
        service.say(7, 1)  # a repetition, however it looks
        service.say(7, 2, b="h:2")
        assert await next_of(watch) == {"b": "h:2"}
        await watch.aclose()
    assert "epoch 6.99 is refused after 7.1" in caplog.text


async def test_another_fleet_behind_the_same_name_is_no_stale_one():
    service = FakeCoordinator()
    async with serving(service) as address:
        watch = reader(address)
        service.say(7, 1, a="h:1")
        assert await next_of(watch) == {"a": "h:1"}
        service.say(6, 0, fleet="g", b="h:2")  # its coordinator started earlier
        assert await next_of(watch) == {"b": "h:2"}
        await watch.aclose()


class TalkativeCoordinator(coordinator_pb2_grpc.CoordinatorServicer):
    """Has news twenty times a second."""

    def __init__(self) -> None:
        self.version = 0
        self.peers: set[str] = set()
        """Other ends of the connections that it was called by."""

    async def Watch(self, request, context):
        self.peers.add(context.peer())
        while True:
            self.version += 1
            yield coordinator_pb2.Topology(fleet="f", term=1, version=self.version)
            await asyncio.sleep(0.05)


async def test_the_address_is_looked_up_anew_while_its_coordinator_answers(monkeypatch):
    monkeypatch.setattr(coordinated, "FOLLOW_S", 0.1)
    service = TalkativeCoordinator()
    async with serving(service) as address:
        watch = reader(address)
        async with asyncio.timeout(20):
            while len(service.peers) < 3:
                assert await anext(watch) == {}
        await watch.aclose()


async def test_pods_stay_while_the_coordinator_is_away_and_its_successor_is_heard():
    service = FakeCoordinator()
    async with serving(service) as address:
        watch = reader(address)
        service.say(1, 1, a="h:1")
        assert await next_of(watch) == {"a": "h:1"}
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    async with serving(service, address):
        service.say(1, 1, a="h:1")  # the same as before: no news
        service.say(2, 0, a="h:3")
        assert await asyncio.wait_for(waiting, 20) == {"a": "h:3"}
        await watch.aclose()


async def test_a_stream_that_ends_in_an_orderly_way_is_asked_for_again():
    service = FakeCoordinator()
    async with serving(service) as address:
        watch = reader(address)
        service.say(1, 1, a="h:1")
        service.said.put_nowait(None)
        service.say(1, 2, b="h:1")
        assert await next_of(watch) == {"a": "h:1"}
        assert await next_of(watch) == {"b": "h:1"}
        await watch.aclose()


async def test_a_silent_coordinator_is_called_anew(monkeypatch):
    monkeypatch.setattr(coordinated, "SILENCE_S", 0.2)
    service = FakeCoordinator()
    calls = 0
    original = service.Watch

    async def counted(request, context):
        nonlocal calls
        calls += 1
        async for topology in original(request, context):
            yield topology

    service.Watch = counted
    async with serving(service) as address:
        watch = reader(address)
        waiting = asyncio.create_task(anext(watch))
        async with asyncio.timeout(10):
            while calls < 2:
                await asyncio.sleep(0.02)
        # only the latest call is listened to: the others may not have noticed yet
        for _ in range(calls + 1):
            service.say(1, 1, a="h:1")
        assert await asyncio.wait_for(waiting, 10) == {"a": "h:1"}
        await watch.aclose()


async def test_a_wrong_token_is_said(caplog):
    async with serving(FakeCoordinator(), token="another") as address:
        waiting = asyncio.create_task(anext(reader(address)))
        async with asyncio.timeout(10):
            while "token is missing or wrong" not in caplog.text:
                await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


def test_without_a_coordinator_only_named_pods_are_there():
    assert isinstance(discover(DiscoveryConfig(), {"a": "h:1"}, Cluster()), StaticPods)
