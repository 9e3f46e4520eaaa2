"""The router over real gRPC, watching pods over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from fake_pod import FakePod, serving
from prometheus_client.registry import CollectorRegistry
from routing import chain

from quire.config.router import RouterConfig
from quire.proto import router_pb2, router_pb2_grpc
from quire.router import pods as pods_module
from quire.router.discovery import StaticPods
from quire.router.metrics import set_fleet_gauges
from quire.router.pods import watch_pods
from quire.router.router import Router
from quire.router.service import RouterService
from quire.telemetry import metrics as m
from quire.telemetry.instruments import render

LIMIT_S = 20


class Replica:
    """One router with its pods watched, and a stub to ask it."""

    def __init__(self, discovery: StaticPods, **options) -> None:
        self.registry = CollectorRegistry()
        self.instruments = m.router_instruments(self.registry)
        self.discovery = discovery
        self.router = Router(RouterConfig(**options), instruments=self.instruments)
        self.fleet = self.router.fleet

    @contextlib.asynccontextmanager
    async def running(self):
        server = grpc.aio.server()
        router_pb2_grpc.add_RouterServicer_to_server(RouterService(self.router), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        watch = watch_pods(self.discovery, self.fleet, self.router.clock, self.instruments)
        watching = asyncio.create_task(watch)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                self.stub = router_pb2_grpc.RouterStub(channel)
                yield self
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await server.stop(grace=None)

    async def until(self, condition) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    def held(self, pod: str) -> int:
        known = self.fleet.pods.get(pod)
        return -1 if known is None else self.fleet.index.count(known.slot)

    def serving(self) -> int:
        return self.fleet.states(self.router.clock())["serving"]

    def resyncs(self, reason: str) -> float:
        return self.instruments.get(m.ROUTER_RESYNCS, reason).value


@pytest.fixture
async def pair():
    """Two pods and a router that knows both."""
    a, b = FakePod(), FakePod()
    async with serving(a) as at_a, serving(b) as at_b:
        replica = Replica(StaticPods({"a": at_a, "b": at_b}))
        async with replica.running():
            await replica.until(lambda: replica.serving() == 2)
            yield a, b, replica


def question(*blocks: int, **fields) -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(
        hashes=b"".join(chain(*blocks)), prompt_len=16 * len(blocks) + 1, **fields
    )


async def test_a_request_goes_where_its_prefix_is_and_says_why(pair):
    _, b, replica = pair
    b.store(*chain(*range(50)))
    await replica.until(lambda: replica.held("b") == 50)
    reply = await replica.stub.Route(question(*range(60), request_id="r1", model="demo"))
    assert (reply.decode_pod, reply.decode_cached_blocks) == ("b", 50)
    assert not reply.HasField("prefill_pod")
    explained = await replica.stub.Explain(router_pb2.ExplainRequest(request_id="r1"))
    (why,) = explained.explanations
    assert why.decision == reply
    assert [(s.pod, s.cached_tokens) for s in why.scores] == [("b", 800), ("a", 0)]
    assert why.scores[0].costs[0].value < why.scores[1].costs[0].value


async def test_what_was_really_cached_comes_back(pair):
    _, b, replica = pair
    b.store(*chain(*range(50)))
    await replica.until(lambda: replica.held("b") == 50)
    reply = await replica.stub.Route(question(*range(60)))
    observed = router_pb2.ObserveRequest(decision_id=reply.decision_id, cached_tokens=640)
    await replica.stub.Observe(observed)
    set_fleet_gauges(replica.instruments, replica.fleet, replica.router.clock())
    page = render(replica.registry)
    assert "quire_router_expected_cached_tokens_total 800.0" in page
    assert "quire_router_actual_cached_tokens_total 640.0" in page
    assert 'quire_router_pods{state="serving"} 2.0' in page
    assert "quire_router_index_blocks 50.0" in page


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (router_pb2.RouteRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (router_pb2.RouteRequest(prompt_len=9, hashes=b"123"), grpc.StatusCode.INVALID_ARGUMENT),
        (question(1, model="other"), grpc.StatusCode.FAILED_PRECONDITION),
        (question(1, exclude_pods=["a", "b"]), grpc.StatusCode.FAILED_PRECONDITION),
    ],
    ids=["no prompt", "broken hashes", "a model nobody serves", "all pods failed it"],
)
async def test_what_cannot_be_routed_is_a_status(pair, request_, code):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await pair[2].stub.Route(request_)
    assert error.value.code() == code


async def test_a_forgotten_decision_is_not_found(pair):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await pair[2].stub.Explain(router_pb2.ExplainRequest(decision_id="x"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_replicas_learn_the_same_from_the_pods_alone(pair):
    a, _, first = pair
    second = Replica(first.discovery)
    async with second.running():
        a.store(*chain(*range(40)))
        for replica in (first, second):
            await replica.until(lambda r=replica: r.held("a") == 40 and r.serving() == 2)
            assert (await replica.stub.Route(question(*range(45)))).decode_pod == "a"


async def test_removed_and_cleared_blocks_leave_the_index(pair):
    a, _, replica = pair
    prompt = chain(*range(10))
    a.store(*prompt)
    await replica.until(lambda: replica.held("a") == 10)
    a.remove(*prompt[5:])
    await replica.until(lambda: replica.held("a") == 5)
    a.clear()
    await replica.until(lambda: replica.held("a") == 0)


async def test_a_gap_brings_a_snapshot(pair):
    a, _, replica = pair
    a.skip = 2
    a.store(*chain(*range(10)))
    await replica.until(lambda: replica.held("a") == 10)
    assert replica.resyncs("gap") == 1
    assert a.requests[-1].after_sequence == 0


async def test_another_digest_brings_a_snapshot(pair):
    a, _, replica = pair
    a.store(*chain(1, 2))
    await replica.until(lambda: replica.held("a") == 2)
    a.lie = True
    await replica.until(lambda: len(a.requests) == 2 and replica.held("a") == 2)
    assert replica.resyncs("digest") == 1
    fleet = replica.fleet
    await replica.until(lambda: fleet.trust(fleet.pods["a"]) == 1.0)


async def test_drift_seen_by_requests_brings_a_snapshot(pair):
    a, _, replica = pair
    a.store(*chain(*range(20)))
    await replica.until(lambda: replica.held("a") == 20)
    for _ in range(10):
        replica.fleet.observe("a", 320, 0, replica.router.clock())
    await replica.until(lambda: len(a.requests) == 2)
    assert replica.resyncs("drift") == 1


async def test_a_restarted_pod_starts_with_an_empty_cache(pair):
    a, _, replica = pair
    a.store(*chain(*range(10)))
    await replica.until(lambda: replica.held("a") == 10)
    a.restart()
    await replica.until(lambda: replica.held("a") == 0 and replica.serving() == 2)
    replica.fleet.index.check_integrity()


async def test_a_broken_connection_resumes_where_its_events_were_left():
    a = FakePod()
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(a))
        replica = Replica(StaticPods({"a": address}))
        async with replica.running():
            a.store(*chain(*range(10)))
            await replica.until(lambda: replica.held("a") == 10)
            await stack.aclose()
            await replica.until(lambda: replica.serving() == 0)
            with pytest.raises(grpc.aio.AioRpcError):
                await replica.stub.Route(question(1))
            a.store(*chain(77))
            async with serving(a, int(address.rpartition(":")[2])):
                await replica.until(lambda: replica.held("a") == 11 and replica.serving() == 1)
            assert a.requests[-1].after_sequence == 10


async def test_a_silent_pod_is_suspected_and_its_call_made_again(monkeypatch):
    monkeypatch.setattr(pods_module, "LOST_AFTER_S", 0.5)
    a, b = FakePod(), FakePod()
    async with serving(a) as at_a, serving(b) as at_b:
        replica = Replica(StaticPods({"a": at_a, "b": at_b}), stale_after_s=0.2)
        async with replica.running():
            a.store(*chain(*range(50)))
            await replica.until(lambda: replica.held("a") == 50 and replica.serving() == 2)
            a.silent = True
            await replica.until(lambda: replica.serving() == 1)
            assert (await replica.stub.Route(question(*range(60)))).decode_pod == "b"
            await replica.until(lambda: len(a.requests) > 1)
            a.silent = False
            await replica.until(lambda: replica.serving() == 2)


async def test_discovered_pods_come_and_go(pair):
    _, b, replica = pair
    b.store(*chain(1, 2, 3))
    await replica.until(lambda: replica.held("b") == 3)
    at_a = (await anext(replica.discovery.watch()))["a"]
    replica.discovery.set({"a": at_a})
    await replica.until(lambda: "b" not in replica.fleet.pods)
    assert len(replica.fleet.index) == 0
