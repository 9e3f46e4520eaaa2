"""A changed fleet file under load, over real Ray: replicas of both versions side by side.

Slow, needs root: `pytest -m slow -s tests/integration/test_ray_rollout.py` prints how long the
replacement takes. One cluster in the order below.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass

import grpc
import pytest
from http_load import Load, complete
from kept_figures import show
from ray_fleet import START_S, fleet_file, gateway, pool, report, running_fleet
from ray_hosts import TOKEN, can_make_namespaces
from waiting import wait_until

from quire import demo
from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
]

OLD, OTHER = "/tmp/model", "/tmp/other"
"""The same weights; a word in its config.json makes the second another model, whose blocks have
another layout fingerprint, and leaves its tokens as they are."""
PREFILL, DECODE = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    content = fleet_file(pool("prefill", 2), pool("decode", 2), engine={"model": OLD})
    base = tmp_path_factory.mktemp("hosts")
    with running_fleet(base, content, before=copy_models, prefill1=2, decode1=2) as fleet:
        show("coordinator and 4 replicas", ready_after_s=fleet.wait_ready(*PREFILL, *DECODE))
        yield fleet


def copy_models(hosts) -> None:
    for host in (hosts["prefill1"], hosts["decode1"]):
        for path in (OLD, OTHER):
            shutil.copytree(demo.path(), host.folder / path.removeprefix("/tmp/"))
        config = host.folder / "other" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "another"}))


@pytest.fixture(scope="module")
def url(fleet):
    # whatever can be computed by a prefill pod is
    flags = ("--routing-policy", "least_load", "--served-model-name", "demo", "--tokenizer", "demo")
    with gateway(fleet.address, *flags) as url:
        yield url


@dataclass(frozen=True)
class Look:
    """The fleet at one moment of a rollout."""

    is_new: frozenset[str]
    """Pods whose engine is of the new version."""
    num_unready: int
    external: dict[str, float]
    """Of decode pods of the new version: prompt tokens that came from a prefill pod."""
    local: dict[str, float]
    """And those that it has computed itself."""

    @property
    def prefill_is_old(self) -> bool:
        return not self.is_new & set(PREFILL)


def test_versions_of_the_same_layout_exchange_blocks(fleet, url) -> None:
    looks = roll_out(fleet, url, max_num_seqs=32)
    received = [look.external for look in looks if look.prefill_is_old]
    assert any(sum(external.values()) > 0 for external in received)


def test_versions_of_other_layouts_prefill_for_themselves(fleet, url) -> None:
    looks = roll_out(fleet, url, max_num_seqs=32, model=OTHER)
    mixed = [look for look in looks if look.prefill_is_old and look.local]
    assert max(sum(look.local.values()) for look in mixed) > 0
    assert {sum(look.external.values()) for look in mixed} == {0}
    for number in range(4):  # all are of the new version now
        complete(url, prompt(1000 + number))
    pods = fleet.pods()
    assert sum(tokens(pods[name].address, "external_kv_transfer") for name in DECODE) > 0
    tried = [page_sum(p.address, "quire_kv_transfers_total", "incompatible") for p in pods.values()]
    assert tried == [0] * 4


def roll_out(fleet, url, **engine) -> list[Look]:
    """Change engine options under load, one replica at a time; no request fails, and what is asked
    meanwhile has the answers that it has afterwards."""
    before = {name: pod.pid for name, pod in fleet.pods().items()}
    answers: dict[int, str] = {}
    looks: list[Look] = []
    with Load(url) as load:
        began = time.monotonic()
        next_coordinator(fleet, engine)

        def is_done() -> bool:
            # of prompts that no pod has in its cache
            answers[len(answers)] = complete(url, prompt(len(answers)))
            look = look_at(fleet, before)
            if look is not None:
                looks.append(look)
            return look is not None and len(look.is_new) == 4 and not look.num_unready

        wait_until(is_done, "all replicas replaced", START_S)
        took = time.monotonic() - began
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
    assert load.failures == []
    assert max(look.num_unready for look in looks) == 1
    assert {number: complete(url, prompt(number)) for number in answers} == answers
    report(f"4 replicas replaced, one at a time, {len(answers)} more answers checked", took, load)
    return looks


def next_coordinator(fleet, engine: dict) -> None:
    """One with another fleet file; the one before leaves everything running."""
    before = fleet.hosts["ctl"].processes[-1]
    before.terminate()
    assert before.wait(60) == 0
    fleet.content["models"][0]["engine"] |= engine
    fleet.up()
    wait_until(lambda: fleet.status() is not None, "the next coordinator", 60)


def look_at(fleet, before: dict[str, int]) -> Look | None:
    """None while the coordinator does not say how every pod is. What pods had counted when they
    were last of this version may be older than the versions, and is not newer."""
    decode = {name: pod for name, pod in fleet.pods().items() if name in DECODE}
    fresh = {n: pod for n, pod in decode.items() if pod.pid not in (0, before[n])}
    external = {n: tokens(pod.address, "external_kv_transfer") for n, pod in fresh.items()}
    local = {n: tokens(pod.address, "local_compute") for n, pod in fresh.items()}
    pods = fleet.pods()
    if not pods or any(pod.state == "unreachable" for pod in pods.values()):
        return None
    return Look(
        frozenset(n for n, pod in pods.items() if pod.pid not in (0, before[n])),
        4 - sum(pod.state == "ready" for pod in pods.values()),
        external,
        local,
    )


def prompt(number: int) -> str:
    return f"# program {number}\n" + "import os\n" * 40 + "def "


def tokens(address: str, source: str) -> float:
    return page_sum(address, "quire_prompt_tokens_by_source_total", source)


def page_sum(address: str, name: str, label: str) -> float:
    """Over the samples of an engine that have this label's value; 0 if it does not answer."""
    request = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())

    async def collect() -> str:
        cluster = Cluster(ClusterConfig(cluster_token=TOKEN))
        async with cluster.channel(address) as channel:
            return (await WorkerStub(channel).Control(request, timeout=10)).metrics

    try:
        lines = asyncio.run(collect()).splitlines()
    except grpc.aio.AioRpcError:
        return 0.0
    found = [line for line in lines if line.startswith(name) and f'"{label}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)
