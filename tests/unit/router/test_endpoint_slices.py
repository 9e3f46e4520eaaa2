"""Discovery by EndpointSlices, against an API server over HTTP that breaks off and refuses."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from quire.cluster.rpc import Cluster
from quire.config.gateway import UpstreamConfig
from quire.config.router import RouterServerConfig
from quire.router import endpoint_slices
from quire.router.coordinated import discover
from quire.router.endpoint_slices import EndpointSlices

pytest.importorskip("kubernetes")
from aiohttp import web
from kubernetes.aio import client

WAIT_S = 10


def slice_of(name: str, *pods: str, service: str = "decode", port: str = "grpc") -> dict:
    """Pods named x-0 have a name in DNS, others an address alone."""
    endpoints = [
        {"addresses": [f"10.0.0.{n}"], "targetRef": {"kind": "Pod", "name": pod}}
        | ({"hostname": pod} if pod[-2] == "-" else {})
        for n, pod in enumerate(pods)
    ]
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "endpoints": endpoints or None,
        "ports": [{"name": port, "port": 9000}],
    }


class ApiServer:
    """Lists what it has, and passes on what `say` is given to whoever watches."""

    def __init__(self) -> None:
        self.slices = [slice_of("a", "decode-0")]
        self.refusals: list[int] = []
        self.watches: list[asyncio.Queue] = []
        self.asked: list[dict] = []

    def say(self, kind: str, subject: dict) -> None:
        self.watches[-1].put_nowait(json.dumps({"type": kind, "object": subject}).encode() + b"\n")

    def hang_up(self) -> None:
        self.watches[-1].put_nowait(None)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.query))
        if self.refusals:
            return web.Response(status=self.refusals.pop(0))
        if "watch" not in request.query:
            page = {"metadata": {"resourceVersion": str(len(self.asked))}, "items": self.slices}
            return web.json_response(page)
        queue: asyncio.Queue = asyncio.Queue()
        self.watches.append(queue)
        response = web.StreamResponse()
        await response.prepare(request)
        while (line := await queue.get()) is not None:
            for half in (line[: len(line) // 2], line[len(line) // 2 :]):
                await response.write(half)
                await asyncio.sleep(0)
        return response


@pytest.fixture
async def server():
    made = ApiServer()
    app = web.Application()
    app.router.add_get("/apis/discovery.k8s.io/v1/namespaces/models/endpointslices", made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    for queue in made.watches:
        queue.put_nowait(None)
    await runner.cleanup()


@pytest.fixture
async def pods(server, monkeypatch):
    """What `watch` yields, one after the other."""
    monkeypatch.setattr(endpoint_slices, "MIN_BACKOFF_S", 0.01)

    @asynccontextmanager
    async def connect():
        async with client.ApiClient(client.Configuration(host=server.url)) as api:
            yield client.DiscoveryV1Api(api)

    watching = EndpointSlices(
        ["prefill", "decode"], {"extra": "10.1.1.1:9000"}, "models", connect
    ).watch()

    async def following() -> dict:
        async with asyncio.timeout(WAIT_S):
            found = dict(await anext(watching))
        assert found.pop("extra") == "10.1.1.1:9000"
        return found

    yield following
    await watching.aclose()


async def watched(server, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(server.watches) < count:
            await asyncio.sleep(0.01)


FIRST = {"decode-0": "decode-0.decode.models.svc:9000"}


async def test_pods_have_their_names_in_dns_or_their_addresses(server, pods) -> None:
    server.slices = [
        slice_of("a", "decode-0", "decode-1"),
        slice_of("b", "loose", service="prefill"),
        slice_of("c", "other", port="http"),
        slice_of("d"),
        # pods of a group that have no port of the Service: their leader answers for them
        slice_of("e", "decode-0-1") | {"ports": None},
    ]
    assert await pods() == {
        "decode-0": "decode-0.decode.models.svc:9000",
        "decode-1": "decode-1.decode.models.svc:9000",
        "loose": "10.0.0.0:9000",
    }
    assert server.asked[0]["labelSelector"] == "kubernetes.io/service-name in (prefill,decode)"


async def test_changes_are_followed_from_the_listed_version(server, pods) -> None:
    assert await pods() == FIRST
    following = asyncio.ensure_future(pods())
    await watched(server, 1)
    assert server.asked[-1]["resourceVersion"] == "1"
    server.say("ADDED", slice_of("b", "prefill-0", service="prefill"))
    assert set(await following) == {"decode-0", "prefill-0"}
    server.say("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    server.say("MODIFIED", slice_of("a", "decode-0", "decode-1"))
    assert set(await pods()) == {"decode-0", "decode-1", "prefill-0"}
    server.say("DELETED", slice_of("a"))
    assert set(await pods()) == {"prefill-0"}


@pytest.mark.parametrize("how", ["hang up", "too old", "no JSON"])
async def test_a_watch_that_ends_is_followed_by_a_list(server, pods, how) -> None:
    await pods()
    following = asyncio.ensure_future(pods())
    await watched(server, 1)
    server.slices = [slice_of("a", "decode-0", "decode-1")]
    if how == "hang up":
        server.hang_up()
    elif how == "too old":
        server.say("ERROR", {"code": 410, "message": "too old resource version"})
    else:
        server.watches[-1].put_nowait(b"<html>\n")
    assert set(await following) == {"decode-0", "decode-1"}


async def test_a_silent_watch_is_left(server, pods, monkeypatch) -> None:
    monkeypatch.setattr(endpoint_slices, "RESYNC_S", 0)
    monkeypatch.setattr(endpoint_slices, "SILENCE_S", 0.2)
    await pods()
    following = asyncio.ensure_future(pods())
    await watched(server, 1)
    server.slices = [slice_of("a", "decode-1")]
    assert set(await following) == {"decode-1"}


async def test_errors_are_waited_out_and_no_pod_is_forgotten(server, pods, caplog) -> None:
    assert await pods() == FIRST
    following = asyncio.ensure_future(pods())
    await watched(server, 1)
    server.refusals = [403, 500, 410]
    server.hang_up()
    await watched(server, 2)  # listed again, and the same: nothing is said
    assert not following.done()
    server.say("ADDED", slice_of("b", "decode-1"))
    assert set(await following) == {"decode-0", "decode-1"}
    assert "may this account list endpointslices?" in caplog.text


async def test_outside_of_a_cluster_it_is_said_so(monkeypatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    watching = EndpointSlices(["decode"], {}, "models").watch()
    with pytest.raises(OSError, match="not in a pod of Kubernetes"):
        await anext(watching)


def test_services_are_an_option_of_gateways_and_routers(monkeypatch, tmp_path) -> None:
    config = UpstreamConfig(kubernetes_service=("decode",))
    with pytest.raises(OSError, match="not in a pod of Kubernetes"):
        discover(config, {}, Cluster())
    (tmp_path / "namespace").write_text("models\n")
    monkeypatch.setattr(endpoint_slices, "NAMESPACE_FILE", tmp_path / "namespace")
    assert isinstance(discover(config, {}, Cluster()), EndpointSlices)
    with pytest.raises(ValueError, match="do not go together"):
        RouterServerConfig(kubernetes_service=("decode",), coordinator="c:1")
