"""Pods as KubeRay would make them of the example's RayCluster start, serve, and drain."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
import ray_cluster_pods as kuberay
from local_pods import LocalRelease
from manifests import EXAMPLES, NAMESPACE, render
from redis_server import PASSWORD, PORT, Redis
from streams import Stream, metric, stream_until_prompts_move
from waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from local_pods import LocalPod
    from manifests import Render

SMALL = (
    "model.uri=demo", "model.sizeGiB=1", "engine.accelerator=cpu", "roles.decode.replicas=1",
    f"ray.redis.address=redis:{PORT}", "router.replicas=1", "gateway.replicas=1",
    "cache.persistence.enabled=false", "secrets.hfToken.existingSecret=",
)  # fmt: skip
LONG = 1800
"""Tokens that take longer than Ray to end on a node."""


def small_cluster() -> Render:
    """The example with what runs on this machine."""
    files = {path.stem: path for path in EXAMPLES}
    return render(files["kuberay"], files["kind-cpu"], sets=SMALL)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Iterator[LocalRelease]:
    if os.geteuid() != 0:
        pytest.skip("pods with a /tmp of their own take root")
    folder = tmp_path_factory.mktemp("kuberay")
    rendered = small_cluster()
    (cluster,) = rendered.of("RayCluster")
    with (
        Redis("127.0.76.2", folder) as redis,
        LocalRelease(rendered, folder, names=True) as release,
    ):
        release.redis = redis
        release.secrets["redis", "redis-password"] = PASSWORD
        for name, template in kuberay.pods_of(cluster):
            release.add(name, template)
        head = f"{kuberay.head_service(cluster)}.{NAMESPACE}.svc"
        (address,) = {pod.address for pod in release.of("coordinator")}
        release.services |= dict.fromkeys((head, f"{head}.cluster.local"), address)
        release.services["redis"] = redis.address
        release.write_hosts()
        first = [pod for pod in release.pods.values() if pod.role not in ("prefill", "decode")]
        for pod in first:
            pod.start()
        release.of("coordinator")[0].wait_for("startupProbe")
        for pod in release.pods.values():
            if pod not in first:
                pod.start()  # once what KubeRay has them wait for is there
        for pod in release.pods.values():
            pod.wait_for("readinessProbe")
        yield release


def test_a_raycluster_serves(release) -> None:
    names = [
        pod.name
        for pod in release.pods.values()
        if "ray.io/cluster" in pod.template["metadata"]["labels"]
    ]
    assert names == ["q-quire-head", "q-quire-head", "q-quire-decode-worker-00000",
                     "q-quire-prefill-worker-00000"]  # fmt: skip
    for pod in release.pods.values():
        assert pod.probe("livenessProbe")
        assert "warning:" not in pod.log
    assert release.run_test_pod().returncode == 0
    stream_until_prompts_move(release)


def test_a_pod_of_a_raycluster_drained_under_a_stream_loses_nothing_of_it(release) -> None:
    undisturbed = Stream(release, LONG).start().finish()
    stream = Stream(release, LONG).start()
    (decode,) = release.of("decode")
    assert decode.terminate() == 0, decode.log
    assert stream.finish() == undisturbed
    decode.start()
    decode.wait_for("readinessProbe")
    Stream(release, 20).start().finish()


def test_without_the_annotation_ray_would_run_in_place_of_our_command() -> None:
    """Or rather after it, and so never."""
    (cluster,) = small_cluster().of("RayCluster")
    plain = deepcopy(cluster)
    del plain["metadata"]["annotations"][kuberay.OVERWRITE]
    for (_, ours), (_, theirs) in zip(
        kuberay.pods_of(cluster), kuberay.pods_of(plain), strict=True
    ):
        assert ours["spec"]["containers"][0]["args"][0] == "node"
        (script,) = theirs["spec"]["containers"][0]["args"]
        assert script.startswith("node ")
        assert " && ulimit -n 65536; ray start" in script


def generated(release: LocalRelease) -> float:
    """Tokens of all engines since their start."""
    counted = "quire_generation_tokens_total{.*}"
    pods = release.of("prefill") + release.of("decode")
    return sum(metric(release, pod, counted) for pod in pods)


def is_ready_as_by_a_kubelet(pod: LocalPod) -> bool:
    """A container that has ended is started again: Ray aborts who asks too early at an address that
    it knows for its old head's."""
    if pod.process.poll() is not None:
        pod.start()
    return pod.probe("readinessProbe")


@pytest.mark.slow
def test_a_head_made_anew_finds_its_cluster_in_redis_and_streams_do_not_notice(release) -> None:
    before = generated(release)
    stream = Stream(release, LONG).start()
    head = release.of("coordinator")
    for pod in head:
        pod.kill()
    assert b"\r\n:0\r\n" not in release.redis.ask("DBSIZE")
    head[0].clear()
    for pod in head:
        pod.start()
    stream.finish()
    for pod in head:
        wait_until(lambda pod=pod: is_ready_as_by_a_kubelet(pod), limit_s=120)
    assert generated(release) >= before + LONG, "the engines are those from before"
    Stream(release, 20).start().finish()


@pytest.mark.parametrize("options", [False, True])
def test_a_redis_address_in_the_environment_is_refused(options) -> None:
    (cluster,) = small_cluster().of("RayCluster")
    assert kuberay.refused(cluster) is None
    broken = deepcopy(cluster)
    head = broken["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"].append({"name": kuberay.REDIS_ADDRESS, "value": "redis:6379"})
    if not options:
        del broken["spec"]["gcsFaultToleranceOptions"]
    assert kuberay.REDIS_ADDRESS in kuberay.refused(broken)
