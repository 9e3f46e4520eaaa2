"""What Kubernetes is told of pods, so that a scale-down takes the idlest."""

from __future__ import annotations

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.aio import client

from quire.config.router import RouterServerConfig
from quire.router import deletion_cost
from quire.router.deletion_cost import ANNOTATION, cost, deletion_costs
from quire.router.pod_updates import PodUpdates

AMOUNTS = st.floats(0, 1e6)
SHARES = st.floats(0, 1)


class FakeFleet:
    """Pods with what they do."""

    def __init__(self, **work: tuple[float, float, float]) -> None:
        self.pods = work

    def work_of(self, pod: str) -> tuple[float, float, float]:
        return self.pods[pod]


@given(AMOUNTS, AMOUNTS, SHARES, AMOUNTS, SHARES)
def test_more_work_never_costs_less_and_outweighs_any_cache(running, wait_s, cached, more, other):
    busier = cost(running + more, wait_s, other)
    assert busier >= cost(running, wait_s, cached) - deletion_cost.LEVELS_OF_CACHE
    assert cost(running + more, wait_s, cached) >= cost(running, wait_s, cached)
    assert cost(2 * running + wait_s + 1, wait_s, 0.0) > cost(running, wait_s, 1.0)
    assert 0 <= busier < 2**31


def test_an_idle_pod_costs_nothing_and_one_with_a_cache_a_little():
    assert cost(0, 0, 0) == 0
    assert cost(0, 0, 0) < cost(0, 0, 0.5) < cost(0, 0, 1.0) < cost(1, 0, 0)


@pytest.fixture
async def api():
    """The API of pods against a server, which notes patches and refuses what it is told to."""
    patches: list[tuple[str, str, str]] = []
    refusals: dict[str, int] = {}

    async def patch(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name in refusals:
            return web.Response(status=refusals[name])
        body = await request.json()
        patches.append((name, body["metadata"]["annotations"][ANNOTATION], request.content_type))
        return web.json_response({"metadata": {"name": name}})

    app = web.Application()
    app.router.add_patch("/api/v1/namespaces/models/pods/{name}", patch)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with client.ApiClient(client.Configuration(host=host)) as made:
        pods = client.CoreV1Api(made)
        pods.patches, pods.refusals = patches, refusals
        yield pods
    await runner.cleanup()


async def test_only_what_has_changed_is_told(api) -> None:
    fleet = FakeFleet(a=(0, 0, 0), b=(3, 0, 0))
    costs = PodUpdates(deletion_costs(fleet, "models"))
    await costs.tell(api)
    kind = "application/strategic-merge-patch+json"
    assert api.patches == [("a", "0", kind), ("b", "10", kind)]
    await costs.tell(api)
    assert len(api.patches) == 2
    fleet.pods = {"a": (1, 0, 0), "b": (3, 0.1, 0)}
    await costs.tell(api)
    assert [each[:2] for each in api.patches[2:]] == [("a", "5"), ("b", "15")]


async def test_what_was_refused_is_told_again_and_a_pod_that_is_gone_is_no_news(
    api, caplog
) -> None:
    costs = PodUpdates(deletion_costs(FakeFleet(a=(0, 0, 0), b=(0, 0, 0), c=(0, 0, 0)), "models"))
    api.refusals.update(a=404, b=403)
    await costs.tell(api)
    assert [each[0] for each in api.patches] == ["c"]
    assert "answers 403 to the deletion cost of b" in caplog.text
    assert "cost of a" not in caplog.text
    api.refusals.clear()
    await costs.tell(api)
    assert [each[0] for each in api.patches] == ["c", "a", "b"]


def test_it_is_of_pods_of_a_service() -> None:
    with pytest.raises(ValueError, match="kubernetes_service"):
        RouterServerConfig(deletion_cost=True)
    assert RouterServerConfig(deletion_cost=True, kubernetes_service=("decode",)).deletion_cost
