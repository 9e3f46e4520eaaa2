"""`quire top` and real workers: what it shows is what they did, and a killed one is no end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import pytest_asyncio
from workers import WorkerProcess, ask

from quire.cli import top
from quire.proto import worker_pb2

ENGINE = {
    "model": "demo", "dtype": "float32", "kv_cache_memory_bytes": 32 << 20, "max_model_len": 512,
    "num_threads": 1,
}  # fmt: skip
TRANSFER = {"kv_transports": ["tcp"], "kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}
LIMIT_S = 60

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    """A prefill and a decode worker that have answered requests with each other's help."""
    folder = tmp_path_factory.mktemp("sockets")
    made = [WorkerProcess(folder, name, ENGINE, TRANSFER) for name in ("d", "p")]
    d, p = made
    try:
        await asyncio.gather(*(worker.ready() for worker in made))
        role = worker_pb2.SetRole(prefill_weight=1.0, decode_weight=0.0)
        await p.stub.Control(worker_pb2.ControlRequest(set_role=role), timeout=10)
        await ask(d, [_submit(number, p) for number in range(4)])
        yield made
    finally:
        await asyncio.gather(*(worker.stop() for worker in made))


def _submit(number: int, prefill: WorkerProcess) -> worker_pb2.Submit:
    message = worker_pb2.Submit(
        request=number, request_id=f"r{number}", attempt=1,
        prompt_token_ids=range(100 + number, 300 + number),
        sampling={"n": 1, "max_tokens": 10, "seed": 1, "temperature": 0.0},
    )  # fmt: skip
    message.prefill.worker, message.prefill.address = prefill.name, prefill.address
    return message


async def test_one_picture_says_what_the_workers_did(pair, capsys, tmp_path) -> None:
    d, p = pair
    gone = f"gone=unix:{tmp_path}/none.sock"
    argv = ["--once", "--json", f"d={d.address}", f"p={p.address}", gone]
    assert await asyncio.to_thread(top.run, argv) == 0
    rows = {row["pod"]: row for row in json.loads(capsys.readouterr().out)["pods"]}
    assert [rows[name]["role"] for name in "dp"] == ["both", "prefill"]
    assert [rows[name]["state"] for name in "dp"] == ["ready", "ready"]
    assert rows["d"]["running"] == rows["d"]["waiting"] == 0
    assert rows["d"]["kv_ratio"] == 0.0
    assert 0 < rows["d"]["itl_p50_s"] <= rows["d"]["itl_p95_s"]
    assert 0 < rows["p"]["ttft_p50_s"] <= rows["p"]["ttft_p95_s"]
    assert rows["d"]["output_tokens_per_s"] == 0.0, "nothing while top looked"
    assert rows["gone"]["state"].startswith("unreachable: ")
    assert rows["gone"]["running"] is None


async def test_both_sides_count_the_same_transfers(pair) -> None:
    """What arrived whole is no cancelled transfer on the side that sent it."""
    d, p = pair
    await ask(d, [_submit(number, p) for number in range(100, 116)])
    for worker in pair:
        await worker.wait_released()
    received = await d.metric("quire_kv_transfers_total{")
    assert received >= 20
    assert await p.metric("quire_kv_transfers_total{") == received
    assert await p.metric('quire_kv_transfers_total{direction="sent"') == received
    page = await p.stub.Control(
        worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics()), timeout=10
    )
    ended = [x for x in page.metrics.splitlines() if x.startswith("quire_kv_transfers_total{")]
    assert len(ended) == 1 and 'outcome="committed"' in ended[0], ended
    assert await p.metric("quire_kv_transfer_bytes_total") == await d.metric(
        "quire_kv_transfer_bytes_total"
    )
    assert await p.metric("quire_kv_transfer_busy_seconds_total") > 0
    assert [rate.peer for rate in (await d.load()).transfer_rates] == ["p"]


async def test_a_killed_worker_is_shown_and_the_others_go_on(pair, tmp_path) -> None:
    """The program itself, without a terminal: a picture a second, in plain lines."""
    d = pair[0]
    victim = WorkerProcess(tmp_path, "v", ENGINE, TRANSFER)
    await victim.ready()
    argv = [f"d={d.address}", f"v={victim.address}", "--interval", "0.2", "--json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "quire", "top", *argv, stdout=subprocess.PIPE
    )

    async def until(found) -> dict:
        async with asyncio.timeout(LIMIT_S):
            while line := await process.stdout.readline():
                rows = {row["pod"]: row for row in json.loads(line)["pods"]}
                if found(rows):
                    return rows
        raise AssertionError("top ended")

    try:
        await until(lambda rows: rows["v"]["state"] == rows["d"]["state"] == "ready")
        answering = asyncio.create_task(ask(d, [_submit(50, d)]))
        await until(lambda rows: rows["d"]["output_tokens_per_s"])
        await answering
        victim.kill()
        rows = await until(lambda rows: rows["v"]["state"].startswith("unreachable"))
        assert rows["d"]["state"] == "ready"
        # another process in its place is found again
        await victim.stop()
        victim = WorkerProcess(tmp_path, "v", ENGINE, TRANSFER)
        await until(lambda rows: rows["v"]["state"] == "ready")
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
        await victim.stop()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
async def test_a_terminal_is_drawn_on_and_left_as_it_was(pair, term) -> None:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "quire", "top", f"d={pair[0].address}", "--interval", "0.2",
        stdout=theirs, env={**os.environ, "TERM": term, "COLUMNS": "200", "LINES": "20"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def read_until(wanted: bytes) -> None:
        nonlocal seen
        while wanted not in seen:
            seen += os.read(ours, 4096)

    try:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.to_thread(read_until, b"1 of 1 ready")
        process.send_signal(signal.SIGINT)
        if term == "xterm":
            async with asyncio.timeout(LIMIT_S):
                await asyncio.to_thread(read_until, top.LEAVE.encode())
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
        os.close(ours)
    assert (b"\x1b" in seen) == (term == "xterm")
    assert seen.startswith(top.ENTER.encode()) == (term == "xterm")
