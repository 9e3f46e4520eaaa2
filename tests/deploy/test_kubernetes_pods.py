"""Pods that ask Kubernetes: discovery by EndpointSlices, readiness gates, costs of deletion."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from fake_kubernetes import FakeKubernetes
from local_pods import LocalRelease
from manifests import EXAMPLES, render
from streams import Stream, metric, stream_until_prompts_move
from waiting import wait_until

from quire.router.readiness_gate import CONDITION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from local_pods import LocalPod

SETS = (
    "discovery=kubernetes", "router.readinessGate=true",
    "roles.decode.workload=Deployment", "roles.decode.replicas=2",
)  # fmt: skip
LONG = 1500


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Iterator[LocalRelease]:
    if os.geteuid() != 0:
        pytest.skip("the files of an account take root")
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    folder = tmp_path_factory.mktemp("kubernetes")
    with LocalRelease(render(path, sets=SETS), folder, names=True) as release:
        yield release


@pytest.fixture(scope="module")
def kubernetes(release) -> Iterator[FakeKubernetes]:
    """The API server, and all pods but the router started, with probes that pass."""
    with FakeKubernetes(release, release.folder) as kubernetes:
        for pod in release.pods.values():
            if pod.role != "router":
                kubernetes.start(pod)
        for pod in workers(release):
            pod.wait_for("readinessProbe")
        yield kubernetes


def workers(release: LocalRelease) -> list[LocalPod]:
    return release.of("prefill") + release.of("decode")


def test_a_worker_is_not_ready_before_a_router_has_it(release, kubernetes) -> None:
    for pod in workers(release):
        assert pod.probe("readinessProbe")
        assert not kubernetes.is_ready(pod)
    (router,) = release.of("router")
    kubernetes.start(router)
    for pod in workers(release):
        wait_until(lambda pod=pod: kubernetes.is_ready(pod))
        assert kubernetes.conditions[pod.name] == {CONDITION: "True"}


def test_gateways_and_routers_find_pods_by_their_slices(release, kubernetes) -> None:
    (gateway,), (router,) = release.of("gateway"), release.of("router")
    gateway.wait_for("readinessProbe")
    router.wait_for("readinessProbe")
    stream_until_prompts_move(release)
    assert not kubernetes.refused, "what is asked, the Roles allow"
    for pod in release.pods.values():
        assert "warning:" not in pod.log, pod.log


def test_a_pod_made_anew_by_its_name_waits_for_routers_again(release, kubernetes) -> None:
    (prefill,) = release.of("prefill")
    assert kubernetes.delete(prefill) == 0, prefill.log
    kubernetes.start(prefill)
    assert not kubernetes.is_ready(prefill)
    wait_until(lambda: kubernetes.is_ready(prefill))


def test_a_scale_down_takes_the_idlest_pod_and_no_stream_notices(release, kubernetes) -> None:
    stream = Stream(release, LONG).start()
    running = "quire_requests_running{.*}"
    (busy,) = (pod for pod in release.of("decode") if metric(release, pod, running) == 1)
    (idle,) = (pod for pod in release.of("decode") if pod is not busy)

    def is_told() -> bool:
        nonlocal stream
        if stream.events[-1] == "[DONE]":  # the next one goes to where its prompt is cached
            stream = Stream(release, LONG).start()
        return kubernetes.cost(busy) > kubernetes.cost(idle)

    wait_until(is_told)
    assert kubernetes.next_to_go("decode") is idle
    assert kubernetes.delete(idle) == 0, idle.log
    stream.finish()
    del release.pods[idle.name]
    deployment = release.render.named("Deployment", busy.name.removesuffix(busy.name[-3:]))
    release.add_replica(deployment, 2)
    (new,) = (pod for pod in release.of("decode") if pod is not busy)
    kubernetes.start(new)
    wait_until(lambda: kubernetes.is_ready(new))
    assert kubernetes.delete(busy) == 0, busy.log
    Stream(release, 20).start().finish()
    assert metric(release, new, "quire_generation_tokens_total{.*}") >= 20
