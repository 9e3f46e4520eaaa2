"""A RayService without Kubernetes: its pods are processes, and KubeRay's part is played.

The order of the tests is that of a RayService's life.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from kuberay import KubeRay, LocalRayCluster
from local_pods import LocalRelease
from manifests import EXAMPLES, render
from network import network
from streams import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = 1800
"""Tokens that take longer than a gateway takes to find the next cluster."""
WITHIN_S = 120


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Iterator[LocalRelease]:
    if os.geteuid() != 0:
        pytest.skip("pods with a /tmp of their own take root")
    if find_spec("aiohttp_cors") is None or find_spec("fastapi") is None:
        pytest.skip("ray[default,serve] is not installed")
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    sets = (
        "ray.enabled=true", "ray.kuberay.enabled=true", "ray.kuberay.kind=RayService",
        "roles.prefill.replicas=0", "roles.decode.replicas=0", "roles.unified.replicas=1",
    )  # fmt: skip
    rendered = render(path, sets=sets)
    with LocalRelease(rendered, tmp_path_factory.mktemp("rayservice"), names=True) as release:
        yield release


@pytest.fixture(scope="module")
def kuberay(release) -> Iterator[KubeRay]:
    with network("head1", "worker1", "head2", "worker2") as net:
        yield KubeRay(release, net.hosts.values())
        for pod in release.pods.values():
            pod.kill()


@pytest.fixture(scope="module")
def first(release, kuberay) -> LocalRayCluster:
    """The first cluster: its head without workers yet. Gateway and router run beside it."""
    cluster = kuberay.make_cluster("first")
    for pod in cluster.head:
        pod.start()
    cluster.head[0].wait_for("readinessProbe")
    for role in ("router", "gateway"):
        release.of(role)[0].start()
    until(lambda: cluster.is_up)
    return cluster


def until(holds) -> None:
    """Raises AssertionError when something does not come to hold in time."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def is_(cluster: LocalRayCluster, *states: str) -> bool:
    return cluster.application().get("status") in states


def test_the_dashboard_refuses_who_does_not_know_rays_token(first) -> None:
    for token in (None, "", "x" * len(first.token)):
        assert first.submit(token) in (401, 403)
    assert first.submit(first.token) == 200


def test_the_application_waits_for_the_fleet_and_runs_when_that_is_complete(release, first) -> None:
    until(lambda: is_(first, "DEPLOYING"))
    time.sleep(8)
    assert is_(first, "DEPLOYING"), "there is no worker"
    for pod in first.workers:
        pod.start()
    until(lambda: is_(first, "RUNNING"))
    (worker,) = first.workers
    assert worker.probe("readinessProbe"), "not before it"
    assert first.head[1].probe("readinessProbe")


def test_gateways_serve_once_the_service_leads_to_the_cluster(release, kuberay, first) -> None:
    (gateway,) = release.of("gateway")
    assert not gateway.probe("readinessProbe")
    kuberay.lead_to(first)
    gateway.wait_for("readinessProbe")
    Stream(release, 20).start().finish()


def test_a_fleet_that_does_not_serve_is_unhealthy_until_it_does_again(release, first) -> None:
    (worker,) = first.workers
    worker.kill()
    until(lambda: is_(first, "UNHEALTHY"))
    worker.start()
    until(lambda: is_(first, "RUNNING"))
    worker.wait_for("readinessProbe")
    Stream(release, 20).start().finish()


def test_an_upgrade_loses_nothing_of_a_stream(release, kuberay, first) -> None:
    """A second cluster is made; when its application runs, the Service is moved, and the first
    cluster goes."""
    undisturbed = Stream(release, LONG).start().finish()
    second = kuberay.make_cluster("second")
    second.start()
    until(lambda: second.is_up)
    until(lambda: second.submit(second.token) == 200)  # KubeRay tries again, too
    until(lambda: is_(second, "RUNNING"))
    stream = Stream(release, LONG).start()
    kuberay.lead_to(second)
    (worker,) = first.workers
    codes = {pod.name: pod.terminate() for pod in (worker, *reversed(first.head))}
    assert codes[worker.name] == 0, worker.log
    assert stream.finish() == undisturbed
    Stream(release, 20).start().finish()
    (gateway,) = release.of("gateway")
    assert "goes on at worker" in gateway.log
