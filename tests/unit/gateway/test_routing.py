"""Requests go where a router says; without an answer in time, where the load is least."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

import grpc
import pytest
from fake_pod import FakePod, serving
from prometheus_client.registry import CollectorRegistry
from routing import chain, make_query
from waiting import until

from quire.api import block_hash
from quire.config.router import RouterConfig
from quire.gateway import routers
from quire.gateway.continuation import Patience
from quire.gateway.fake_worker import FakeWorker, speak
from quire.gateway.routers import NoDecision, OwnRouter, RemoteRouter, Silence
from quire.gateway.routing import RouterPlacement
from quire.gateway.workers import Workers
from quire.proto import common_pb2, router_pb2, router_pb2_grpc, worker_pb2
from quire.router.discovery import StaticPods
from quire.router.pods import watch_pods
from quire.router.router import Router
from quire.router.service import RouterService
from quire.telemetry import metrics as m
from quire.telemetry.instruments import render

LIMIT_S = 10
MODEL = worker_pb2.ModelInfo(model="m", fingerprint=b"f", block_size=16)


@dataclass
class Scripted:
    """A router that says what it is told to."""

    name: str
    says: dict | Silence = field(default_factory=dict)
    is_up: bool = True
    asked: list = field(default_factory=list)
    observed: list = field(default_factory=list)

    async def run(self):
        await asyncio.Event().wait()

    async def route(self, query):
        self.asked.append(query)
        if isinstance(self.says, Silence):
            raise NoDecision(self.says)
        return router_pb2.RouteReply(decision_id=f"{self.name}-1", **self.says)

    def observe(self, decision_id, cached_tokens):
        self.observed.append((decision_id, cached_tokens))

    async def explain(self, decision_id):
        return None

    def show(self):
        pass


class Request:
    def query(self, model, exclude):
        return make_query(1, 2, model=model.model, exclude=exclude)


def workers(*names: str) -> list[FakeWorker]:
    return [FakeWorker(MODEL, speak([5]), name=name) for name in names]


def placement(*replicas) -> tuple[RouterPlacement, m.Instruments]:
    instruments = m.gateway_instruments(CollectorRegistry())
    made = RouterPlacement(replicas, instruments)
    made._replicas = list(replicas)  # in this order, not a random one
    return made, instruments


def count(instruments, by: str) -> float:
    return instruments.get(m.GATEWAY_PLACEMENTS, by).value


async def pick(made, ready, exclude=()):
    return await made.pick(Request(), ready, frozenset(exclude))


async def test_the_routers_word_is_what_happens():
    router = Scripted("r", {"decode_pod": "b", "prefill_pod": "c"})
    made, instruments = placement(router)
    a, b, c = workers("a", "b", "c")
    place = await pick(made, [a, b, c], ["gone"])
    assert (place.worker, place.prefill) == (b, c)
    assert router.asked[0].exclude == {"gone"}
    assert router.asked[0].model == "m"
    assert (count(instruments, "router"), count(instruments, "least_load")) == (1, 0)


@pytest.mark.parametrize("silence", Silence)
async def test_another_router_is_asked_and_kept(silence):
    first, second = Scripted("1", silence), Scripted("2", {"decode_pod": "b"})
    made, instruments = placement(first, second)
    both = workers("a", "b")
    for _ in range(3):
        assert (await pick(made, both)).worker is both[1]
    assert (len(first.asked), len(second.asked)) == (1, 3)
    assert instruments.get(m.GATEWAY_ROUTE_FAILURES, silence.value).value == 1


async def test_no_router_answers_then_one_does(caplog):
    first, second = Scripted("1", Silence.TIMEOUT), Scripted("2", Silence.UNREACHABLE)
    made, instruments = placement(first, second, Scripted("3", {"decode_pod": "a"}))
    busy, idle = workers("a", "b")
    busy.load.running = 9
    with caplog.at_level(logging.INFO, logger="quire.gateway.routing"):
        for _ in range(3):  # two are asked, not three: the wait is bounded
            place = await pick(made, [busy, idle])
            assert (place.worker, place.decided) == (idle, None)
        made.show()
        assert instruments.get(m.GATEWAY_ROUTERS_UP).value == 3
        first.is_up = second.is_up = False
        assert (await pick(made, [busy, idle])).worker is busy
    assert (len(first.asked), len(second.asked)) == (3, 3)
    assert count(instruments, "least_load") == 3
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"], "one line per change"


async def test_routers_that_are_known_to_be_down_cost_nothing():
    down = Scripted("1", {"decode_pod": "a"}, is_up=False)
    made, _ = placement(down)
    assert (await pick(made, workers("a"))).decided is None
    assert not down.asked


async def test_a_pod_that_is_not_ready_here_is_not_taken():
    made, instruments = placement(Scripted("1", {"decode_pod": "elsewhere"}))
    a = workers("a")
    assert (await pick(made, a)).worker is a[0]
    assert instruments.get(m.GATEWAY_ROUTE_FAILURES, "unknown_pod").value == 1


@pytest.mark.parametrize(
    ("decided", "admission", "told"),
    [
        ({}, {"cached_tokens": 32}, [32]),
        ({"prefill_pod": "p"}, {"cached_tokens": 16, "remote": {"cached_tokens": 64}}, [64]),
        # computed elsewhere than decided: says nothing about the pod that was chosen
        ({"prefill_pod": "p"}, {"cached_tokens": 16}, []),
        ({"prefill_pod": "p"}, {"cached_tokens": 16, "remote": {"failed": True}}, []),
    ],
    ids=["local", "remote", "fell back before it was asked", "fell back"],
)
async def test_the_router_that_decided_hears_what_was_cached(decided, admission, told):
    router = Scripted("r", {"decode_pod": "a", **decided})
    made, _ = placement(router)
    place = await pick(made, workers("a", "p"))
    remote = admission.pop("remote", None)
    message = worker_pb2.Admission(**admission)
    if remote is not None:
        message.remote.CopyFrom(worker_pb2.RemotePrefill(**remote))
    place.decided.observe(message)
    assert router.observed == [("r-1", cached) for cached in told]


async def test_a_retry_names_the_workers_that_failed_and_the_tokens_so_far():
    """Over real continuations: hashes are those of the workers, exclusions those of the losses."""

    async def dies(submit):
        yield worker_pb2.ChoiceOutput(token_ids=range(20), admission={"cached_tokens": 0})
        fakes[0].stop()

    router = Scripted("r", {"decode_pod": "0"})
    made, _ = placement(router)
    scripts = (dies, speak([*range(24)]))
    fakes = [FakeWorker(MODEL, script, name=str(i)) for i, script in enumerate(scripts)]
    both = Workers(fakes, Patience(wait_s=2.0), placement=made)
    running = asyncio.create_task(both.run())
    submit = worker_pb2.Submit(prompt_token_ids=[7] * 40, request_id="r", cache_salt=b"s")
    submit.sampling.n, submit.sampling.max_tokens = 1, 24
    try:
        async with both.submit([submit]) as replies, asyncio.timeout(LIMIT_S):
            ends = 0
            while not ends:
                for _, output in await replies.next():
                    router.says = {"decode_pod": "1"}
                    ends += output.finish_reason == common_pb2.FINISH_REASON_LENGTH
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    first, again = router.asked
    root = block_hash.root(b"f", salt=b"s")
    assert first.hashes == b"".join(block_hash.extend(root, [7] * 40))
    assert again.hashes == b"".join(block_hash.extend(root, [7] * 40 + [*range(20)]))
    assert (first.exclude, again.exclude) == (frozenset(), {"0"})
    assert (first.prompt_len, again.prompt_len) == (40, 60)
    assert router.observed == [("r-1", 0)]


# ---- over the wire


class Hanging(RouterService):
    """A router's service that can be made to say nothing, as a stopped process does."""

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def Route(self, request, context):
        await self.go_on.wait()
        return await super().Route(request, context)

    async def Check(self, request, context):
        await self.go_on.wait()
        return await super().Check(request, context)


@contextlib.asynccontextmanager
async def router_process(pods: dict[str, str], port: int = 0):
    instruments = m.router_instruments(CollectorRegistry())
    router = Router(RouterConfig(), instruments=instruments)
    watch = asyncio.create_task(
        watch_pods(StaticPods(pods), router.fleet, router.clock, instruments)
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = Hanging(router)
    router_pb2_grpc.add_RouterServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield service, port
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await server.stop(None)


@contextlib.asynccontextmanager
async def running(job):
    task = asyncio.create_task(job)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch):
    monkeypatch.setattr(routers, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(routers, "CHECK_TIMEOUT_S", 0.2)


async def test_a_router_that_hangs_is_not_asked_until_it_answers_again():
    pod = FakePod(model="m")
    pod.store(*chain(1, 2))
    async with serving(pod) as address, router_process({"a": address}) as (service, port):
        remote = RemoteRouter(f"127.0.0.1:{port}")
        async with running(remote.run()):
            await until(lambda: remote.is_up)
            reply = await remote.route(make_query(1, 2, model="m"))
            assert (reply.decode_pod, reply.decode_cached_blocks) == ("a", 2)
            explained = await remote.explain(reply.decision_id)
            assert [s.pod for s in explained.scores] == ["a"]
            assert await remote.explain("forgotten") is None
            with pytest.raises(NoDecision) as error:
                await remote.route(make_query(1, model="other"))
            assert error.value.why is Silence.NO_POD
            assert remote.is_up, "it is the request that cannot be served"

            service.go_on.clear()
            with pytest.raises(NoDecision) as error:
                await remote.route(make_query(1, 2, model="m"))
            assert error.value.why is Silence.TIMEOUT
            assert not remote.is_up
            service.go_on.set()
            await until(lambda: remote.is_up)

            service.go_on.clear()
            await until(lambda: not remote.is_up)  # found out without a request
            service.go_on.set()
            await until(lambda: remote.is_up)


async def test_a_router_without_pods_is_not_asked():
    async with router_process({"a": "127.0.0.1:1"}) as (_, port):
        remote = RemoteRouter(f"127.0.0.1:{port}")
        async with running(remote.run()):
            await asyncio.sleep(0.2)
            assert not remote.is_up
            with pytest.raises(NoDecision) as error:
                await remote.route(make_query(1))
            assert error.value.why is Silence.NO_POD


async def test_nobody_at_the_address_is_unreachable():
    remote = RemoteRouter("127.0.0.1:1")
    async with running(remote.run()):
        await asyncio.sleep(0.05)
        with pytest.raises(NoDecision) as error:
            await remote.route(make_query(1))
        assert error.value.why in (Silence.UNREACHABLE, Silence.TIMEOUT)


async def test_observations_that_nobody_takes_are_dropped():
    remote = RemoteRouter("127.0.0.1:1")
    for _ in range(routers.MAX_OBSERVATIONS + 10):
        remote.observe("d", 1)
    assert remote._observations.qsize() == routers.MAX_OBSERVATIONS


async def test_the_router_in_this_process_watches_the_pods_by_itself():
    pod = FakePod(model="m")
    pod.store(*chain(1, 2))
    async with serving(pod) as address:
        registry = CollectorRegistry()
        own = OwnRouter(RouterConfig(), StaticPods({"a": address}), m.router_instruments(registry))
        with pytest.raises(NoDecision):
            await own.route(make_query(1, 2))
        async with running(own.run()):
            await until(lambda: own.router.fleet.states(own.router.clock())["serving"] == 1)
            await until(lambda: own.router.fleet.index.count(own.router.fleet.pods["a"].slot) == 2)
            reply = await own.route(make_query(1, 2, model="m"))
            assert (reply.decode_pod, reply.decode_cached_blocks) == ("a", 2)
            own.observe(reply.decision_id, 32)
            own.show()
            assert "quire_router_index_blocks 2.0" in render(registry)
            assert (await own.explain(reply.decision_id)).decision == reply
