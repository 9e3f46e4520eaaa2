"""`quire doctor` and real workers under a token: pairs measured, mismatches named."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
import pytest_asyncio
from wire import unknown_field
from workers import WorkerProcess, ask

from quire.cli import doctor
from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

TOKEN = "of the cluster"
ENGINE = {
    "model": "demo", "dtype": "float32", "kv_cache_memory_bytes": 16 << 20, "max_model_len": 512,
    "num_threads": 1,
}  # fmt: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Guarded(WorkerProcess):
    """A worker that answers only those who know the token."""

    def __init__(self, folder, name: str, dtype: str, transports: list[str]) -> None:
        # patient: the tests' machine is small and may be busy
        transfer = {
            "kv_transports": transports, "cluster_token": TOKEN, "kv_heartbeat_s": 5.0,
            "kv_connect_timeout_s": 10.0,
        }  # fmt: skip
        super().__init__(folder, name, ENGINE | {"dtype": dtype}, transfer)
        cluster = Cluster(ClusterConfig(cluster_token=TOKEN))
        self.channel = cluster.channel(self.address)
        self.stub = WorkerStub(self.channel)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trio(tmp_path_factory):
    """Two that can exchange blocks, and one whose blocks are of another type."""
    folder = tmp_path_factory.mktemp("sockets")
    made = [
        Guarded(folder, "a", "float32", ["tcp", "grpc"]),
        Guarded(folder, "b", "float32", ["grpc", "tcp"]),
        Guarded(folder, "c", "bfloat16", ["tcp"]),
    ]
    try:
        await asyncio.gather(*(worker.ready() for worker in made))
        yield made
    finally:
        await asyncio.gather(*(worker.stop() for worker in made))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; its exit code and what it printed."""
    monkeypatch.setenv("QUIRE_CLUSTER_TOKEN", TOKEN)
    # this machine's own troubles are not what is tested
    monkeypatch.setattr("quire.cli.checks.machine", lambda: iter(()))

    async def call(*argv: str):
        code = await asyncio.to_thread(doctor.run, list(argv))
        return code, capsys.readouterr().out

    return call


async def test_every_pair_is_measured_over_every_transport_that_both_have(trio, run):
    a, b, _ = trio
    code, out = await run("--json", "--probe-bytes", "4M", f"a={a.address}", f"b={b.address}")
    report = json.loads(out)
    assert code == 0 and report["ok"], report
    assert [(w["name"], w["level"]) for w in report["workers"]] == [("a", "ok"), ("b", "ok")]
    pairs = {(p["source"], p["target"], p["transport"]): p for p in report["pairs"]}
    assert set(pairs) == {(s, t, by) for s, t in ("ab", "ba") for by in ("tcp", "grpc")}
    for pair in pairs.values():
        assert pair["gigabytes_per_s"] > 0 and pair["ms_per_1k_tokens"] > 0
        assert 0 < pair["latency_p50_ms"] <= pair["latency_p99_ms"]
        assert pair["same_layout"] and not pair["problem"]


async def test_another_layout_is_named_and_is_a_failure(trio, run):
    a, _, c = trio
    code, out = await run(f"a={a.address}", f"c={c.address}")
    assert code == doctor.FAILED
    rows = [line for line in out.splitlines() if line.startswith(("a ", "c "))]
    assert len(rows) == 2
    assert "differs" in rows[0] and "dtype=bfloat16 here dtype=float32" in rows[0]
    assert "something fails" in out


async def test_who_cannot_be_asked_is_named_with_the_reason(trio, run, monkeypatch, tmp_path):
    a = trio[0]
    code, out = await run("--json", f"a={a.address}", f"gone=unix:{tmp_path}/none.sock")
    assert code == doctor.FAILED
    (_, gone), pairs = json.loads(out)["workers"], json.loads(out)["pairs"]
    assert (gone["name"], gone["level"]) == ("gone", "fail") and gone["advice"]
    assert pairs == []
    monkeypatch.setenv("QUIRE_CLUSTER_TOKEN", "wrong")
    code, out = await run(a.address)
    assert code == doctor.FAILED
    assert "token is missing or wrong" in out


async def test_a_worker_measures_for_one_at_a_time_and_refuses_nonsense(trio):
    a, b, c = trio
    kv = (await b.ready()).kv
    probe = worker_pb2.Probe(bytes=64 << 20, transports=["tcp"])
    probe.peer.worker, probe.peer.incarnation = kv.worker, kv.incarnation
    probe.peer.listeners.extend(kv.listeners)

    def ask(probe):
        return a.stub.Control(worker_pb2.ControlRequest(probe=probe), timeout=60)

    replies = await asyncio.gather(*(ask(probe) for _ in range(8)))
    assert any(reply.ok and reply.probes[0].bytes_per_s > 0 for reply in replies)
    assert {r.message for r in replies if not r.ok} <= {"another probe is running"}
    assert sum(not r.ok for r in replies) > 0, "8 at once are not measured at once"
    for wrong in (
        worker_pb2.Probe(),
        worker_pb2.Probe(peer=probe.peer, transports=["tcp"] * 9),
        worker_pb2.Probe(peer={"rank": 3, "degree": 2, "listeners": list(kv.listeners)}),
    ):
        reply = await ask(wrong)
        assert not reply.ok and reply.message
    # an endpoint that refuses is a finding, not an error
    other = (await c.ready()).kv
    probe.peer.incarnation = other.incarnation
    probe.peer.ClearField("listeners")
    probe.peer.listeners.extend(other.listeners)
    (result,) = (await ask(probe)).probes
    assert result.failure == "incompatible" and "dtype=bfloat16" in result.detail


async def test_a_prompt_for_a_worker_of_another_layout_is_computed_here(trio):
    a, _, c = trio

    def submit(number: int, hint: WorkerProcess | None) -> worker_pb2.Submit:
        message = worker_pb2.Submit(
            request=number, request_id=f"r{number}", attempt=1,
            prompt_token_ids=range(50, 250),
            sampling={"n": 1, "max_tokens": 8, "seed": 1, "temperature": 0.0},
        )  # fmt: skip
        if hint is not None:
            message.prefill.worker, message.prefill.address = hint.name, hint.address
        return message

    (got,) = await ask(a, [submit(1, c)])
    reset = worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache())
    await a.stub.Control(reset, timeout=10)
    (want,) = await ask(a, [submit(2, None)])
    assert got.failure is None
    assert got.tokens == want.tokens and len(got.tokens[0]) == 8
    page = await c.stub.Control(
        worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics()), timeout=10
    )
    (line,) = (x for x in page.metrics.splitlines() if 'outcome="incompatible"' in x)
    assert 'peer="a"' in line and line.endswith(" 1.0")


async def test_a_command_of_a_later_version_is_refused_and_no_more(trio):
    a = trio[0]
    later = worker_pb2.ControlRequest.FromString(unknown_field())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await a.stub.Control(later, timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    health = worker_pb2.ControlRequest(health=worker_pb2.Health())
    assert (await a.stub.Control(health, timeout=10)).health.ready
