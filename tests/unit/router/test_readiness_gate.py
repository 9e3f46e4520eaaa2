"""What Kubernetes is told of pods, so that their readiness waits for routers."""

from __future__ import annotations

import pytest
from kubernetes.aio.client import ApiException
from routing import add_pod, make_router, report

from quire.config.router import RouterServerConfig
from quire.router.pod_updates import PodUpdates
from quire.router.readiness_gate import CONDITION, readiness_gates


class Pods:
    """The API of pods, as far as it is asked."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refusal: int | None = None

    async def patch_namespaced_pod_status(self, pod: str, namespace: str, body: dict) -> None:
        if self.refusal is not None:
            raise ApiException(status=self.refusal)
        assert namespace == "models"
        (condition,) = body["status"]["conditions"]
        assert (condition["type"], condition["status"]) == (CONDITION, "True")
        self.told.append(pod)


@pytest.fixture
def router():
    return make_router(2)


@pytest.fixture
def gates(router) -> PodUpdates:
    return PodUpdates(readiness_gates(router.fleet, "models"))


async def test_a_pod_is_told_once_it_takes_requests(router, gates) -> None:
    report(router, "p1", draining=True)
    pods = Pods()
    await gates.tell(pods)
    await gates.tell(pods)
    assert pods.told == ["p0"]
    report(router, "p1")
    await gates.tell(pods)
    assert pods.told == ["p0", "p1"]


async def test_another_process_by_the_same_name_is_told_anew(router, gates) -> None:
    """A StatefulSet's new pod has the old one's name, and not its conditions."""
    pods = Pods()
    await gates.tell(pods)
    add_pod(router, "p0", {"incarnation": 2})
    await gates.tell(pods)
    assert pods.told == ["p0", "p1", "p0"]


async def test_what_was_refused_is_told_again(router, gates, caplog) -> None:
    pods = Pods()
    pods.refusal = 403
    await gates.tell(pods)
    assert "answers 403 to the readiness gate of p0" in caplog.text
    pods.refusal = None
    await gates.tell(pods)
    assert pods.told == ["p0", "p1"]


def test_it_is_of_pods_of_a_service() -> None:
    with pytest.raises(ValueError, match="readiness_gate is of pods found by kubernetes_service"):
        RouterServerConfig(readiness_gate=True)
