"""The commands of a rendered chart start, serve, and drain."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import grpc
import httpx2
import pytest
from local_pods import LocalRelease
from manifests import EXAMPLES, RELEASE, render
from streams import Stream, metric, stream_until_prompts_move
from waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


LEADER, FOLLOWER = f"{RELEASE}-quire-unified-0", f"{RELEASE}-quire-unified-0-1"
LONG = 1800
"""Tokens that take longer than Ray to end on a node."""


def test_every_component_runs_and_its_probes_agree(release) -> None:
    assert {pod.role for pod in release.pods.values()} == {"gateway", "router", "prefill", "decode"}
    for pod in release.pods.values():
        assert pod.process.poll() is None
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod.probe(kind), f"{pod.name}: {kind}"


def test_no_command_warns_of_its_options(release) -> None:
    for pod in release.pods.values():
        assert "warning:" not in pod.log, pod.log


def test_helm_test_passes(release) -> None:
    done = release.run_test_pod()
    assert done.returncode == 0, done.stdout
    assert "answer:" in done.stdout


def test_prompts_move_from_the_prefill_pod_to_decode_pods(release) -> None:
    stream_until_prompts_move(release)


def test_who_does_not_know_the_token_gets_no_metrics(release) -> None:
    for pod in release.pods.values():
        port = "http" if pod.role == "gateway" else "status"
        assert httpx2.get(pod.url(port, "/metrics")).status_code == 401


def test_a_decode_pod_drained_under_a_stream_loses_nothing_of_it(release) -> None:
    undisturbed = Stream(release, 400).start().finish()
    stream = Stream(release, 400).start()
    pod = max(
        release.of("decode"), key=lambda pod: metric(release, pod, "quire_requests_running{.*}")
    )
    assert pod.terminate() == 0, pod.log
    assert stream.finish() == undisturbed
    pod.start()
    pod.wait_for("readinessProbe")


def test_a_drained_gateway_finishes_what_it_has(release) -> None:
    gateway = release.of("gateway")[0]
    stream = Stream(release, 600).start()
    assert gateway.terminate() == 0, gateway.log
    stream.finish()
    gateway.start()
    gateway.wait_for("readinessProbe")


@pytest.mark.skipif(os.geteuid() != 0, reason="a hosts file of their own takes root")
def test_pods_with_certificates_find_each_other_by_name(tmp_path) -> None:
    """The certificates that the chart makes are for the names that the chart uses."""
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    secure = render(path, sets=("cluster.tls.enabled=true",))
    with LocalRelease(secure, tmp_path, names=True) as release:
        for pod in release.pods.values():
            pod.start()
        for pod in release.pods.values():
            pod.wait_for("readinessProbe")
        (decode,) = release.of("decode")
        stream_until_prompts_move(release)
        address = f"{decode.address}:{decode.port('grpc')}"
        with grpc.insecure_channel(address) as plain, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(plain).result(timeout=2)


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Iterator[LocalRelease]:
    """A model over two pods, a rank in each, with router and gateway."""
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    rendered = render(
        path,
        sets=(
            "roles.prefill.replicas=0", "roles.unified.replicas=1", "roles.decode.replicas=0",
            "engine.tensorParallel=2", "engine.hosts=2",
        ),
    )  # fmt: skip
    with LocalRelease(rendered, tmp_path_factory.mktemp("group")) as release:
        for pod in release.pods.values():
            pod.start()
        release.pods[LEADER].wait_for("startupProbe")
        for role in ("router", "gateway"):
            release.of(role)[0].wait_for("readinessProbe")
        yield release


def test_a_model_over_two_pods_is_served_by_their_leader(group) -> None:
    assert set(group.pods) > {LEADER, FOLLOWER}
    assert group.run_test_pod().returncode == 0
    Stream(group, 20).start().finish()
    leader = group.pods[LEADER]
    wait_until(lambda: metric(group, leader, "quire_generation_tokens_total{.*}") >= 36)
    for pod in group.pods.values():
        assert pod.process.poll() is None
        assert "warning:" not in pod.log, pod.log
    with socket.socket() as sock:
        address = (group.pods[FOLLOWER].address, leader.port("grpc"))
        assert sock.connect_ex(address), "nobody is to ask there"


def test_a_pod_of_a_group_that_is_lost_ends_the_group_which_made_anew_serves_again(group) -> None:
    leader, follower = group.pods[LEADER], group.pods[FOLLOWER]
    follower.kill()
    assert leader.process.wait(30) != 0, "its container is started again, which recreates the group"
    for pod in (follower, leader):
        pod.start()
    leader.wait_for("readinessProbe")
    Stream(group, 20).start().finish()


def test_a_group_that_is_told_to_end_finishes_what_it_has(group) -> None:
    """Kubernetes tells all pods of a group at once."""
    leader, follower = group.pods[LEADER], group.pods[FOLLOWER]
    stream = Stream(group, 400).start()
    follower.process.send_signal(signal.SIGTERM)
    assert leader.terminate() == 0, leader.log
    stream.finish()
    assert follower.process.wait(10) == 0


@pytest.fixture(scope="module")
def ray_release(tmp_path_factory) -> Iterator[LocalRelease]:
    """Ray's head with the coordinator, a prefill and a decode pod as nodes, router, gateway."""
    if os.geteuid() != 0:
        pytest.skip("pods with a /tmp of their own take root")
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    rendered = render(path, sets=("ray.enabled=true", "cluster.tls.enabled=true"))
    folder = tmp_path_factory.mktemp("ray")
    with LocalRelease(rendered, folder, names=True) as release:
        order = ("coordinator", "prefill", "decode", "router", "gateway")
        for pod in release.pods.values():
            pod.start()
        for pod in [pod for role in order for pod in release.of(role)]:
            pod.wait_for("startupProbe")
        for pod in release.pods.values():
            pod.wait_for("readinessProbe")
        yield release


def test_pods_on_ray_serve_over_the_coordinators_topology(ray_release) -> None:
    roles = {pod.role for pod in ray_release.pods.values()}
    assert roles == {"coordinator", "gateway", "router", "prefill", "decode"}
    for pod in ray_release.pods.values():
        assert pod.probe("livenessProbe")
        assert "warning:" not in pod.log
    assert ray_release.run_test_pod().returncode == 0
    Stream(ray_release, 20).start().finish()


def test_a_node_of_ray_drained_under_a_stream_loses_nothing_of_it_and_is_taken_up_again(
    ray_release,
) -> None:
    undisturbed = Stream(ray_release, LONG).start().finish()
    stream = Stream(ray_release, LONG).start()
    (decode,) = ray_release.of("decode")
    assert metric(ray_release, decode, "quire_requests_running{.*}") == 1
    assert decode.terminate() == 0, decode.log
    moved = r'quire_gateway_resubmissions_total{.*reason="draining".*}'
    assert metric(ray_release, ray_release.of("gateway")[0], moved) == 1
    assert stream.finish() == undisturbed
    decode.start()
    decode.wait_for("readinessProbe")
    Stream(ray_release, 20).start().finish()
