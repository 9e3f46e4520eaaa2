"""Workers that end, stop for ever or change their role under steady load: no request fails, every
text is that of a calm run, and sequences that leave a worker in good order take their KV along."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import pytest
from hang import busiest_thread, hung
from pages import total, wait_released
from server import running_server
from unlike import Load, assert_same_answers
from waiting import wait_until

from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

ENGINE = ("--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1")
FLAGS = (
    *ENGINE, "--prefill", "1", "--decode", "2", "--routing-policy", "least_load",
    "--kv-lease-s", "10", "--kv-heartbeat-s", "2", "--cluster-token", "t", "--max-step-age", "4",
)  # fmt: skip
RESTART_S = 60
MIGRATED = "quire_migrated_sequences_total"
numbers = itertools.count()


@pytest.fixture(scope="module")
def reference():
    with running_server(*ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def server(reference):  # which is there before, and has its sockets elsewhere
    with tempfile.TemporaryDirectory(prefix="q") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        with running_server(*FLAGS) as server:
            wait_until(lambda: up(server) == 3, "all workers are ready", RESTART_S)
            server.folder = folder
            yield server


def control(server, number: int, *words: str) -> None:
    [socket] = Path(server.folder).glob(f"quire-*/worker-{number}.sock")
    command = [sys.executable, "-m", "quire", "control", f"unix:{socket}", *words]
    subprocess.run([*command, "--cluster-token", "t"], check=True, timeout=60)


def is_stuck(server, number: int) -> bool:
    """The worker's process lives, and its engine stands still in the middle of something."""
    request = worker_pb2.ControlRequest(health=worker_pb2.Health())
    try:
        before = ask(server, number, request).health.step_age_s
        time.sleep(0.3)
        return ask(server, number, request).health.step_age_s - before > 0.2
    except grpc.RpcError:
        return False


def ask(server, number: int, request):
    [socket] = Path(server.folder).glob(f"quire-*/worker-{number}.sock")
    token = (("authorization", "Bearer t"),)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        return WorkerStub(channel).Control(request, timeout=1, metadata=token)


def up(server) -> float:
    return server.metric("quire_gateway_worker_up")


def count(server, start: str, *parts: str) -> float:
    return total([server.get("/metrics")], start, *parts)


async def busy_worker(server) -> int:
    """Number of a decode worker that answers several requests: the router may use one alone."""

    def running(number: int) -> float:
        return count(server, "quire_requests_running{", f'engine="{number}"')

    async with asyncio.timeout(RESTART_S):
        while True:
            for number in (1, 2):
                if await asyncio.to_thread(running, number) >= 3:
                    return number
            await asyncio.sleep(0.05)


def under_load(server, reference, what) -> None:
    """Requests without a pause while `what` is done; each answer is compared, and no block kept."""
    load = Load([server.port], numbers)

    async def run() -> None:
        async with load.running():
            await what()

    asyncio.run(run())
    assert_same_answers(reference, load.answers)
    wait_released(lambda: [server.get("/metrics")], 3)


async def until(condition, what: str, seconds: float = RESTART_S) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def resubmissions(server, *parts: str) -> float:
    return count(server, "quire_gateway_resubmissions_total", *parts)


def committed(server, number: int) -> float:
    """Transfers of prompts that the worker computed for others."""
    labels = ('direction="sent"', 'outcome="committed"', f'engine="{number}"')
    return count(server, "quire_kv_transfers_total", *labels)


def test_a_decode_worker_that_ends_hands_over_its_sequences_with_their_blocks(
    server, reference
) -> None:
    takes = 0

    async def drain() -> None:
        nonlocal takes
        pids = {number: server.worker_pid(number) for number in (1, 2)}
        leaves = await busy_worker(server)
        takes = 3 - leaves
        os.kill(pids[leaves], signal.SIGTERM)
        await until(lambda: pids[leaves] not in server.pids(), "it ended")
        await until(lambda: up(server) == 3, "it is back")

    # What moves with few blocks missing is recomputed; how much runs at that moment is chance.
    for _ in range(5):
        prompts = committed(server, 0)
        under_load(server, reference, drain)
        assert committed(server, 0) > prompts, "no prompt was computed elsewhere"
        if count(server, MIGRATED, f'engine="{takes}"', 'how="kv"') > 0:
            break
    assert count(server, MIGRATED, f'engine="{takes}"', 'how="kv"') > 0
    assert count(server, "quire_migrated_blocks_total", f'engine="{takes}"') > 0


@pytest.mark.slow
def test_requests_leave_an_engine_that_hangs(server, reference) -> None:
    before = resubmissions(server, 'reason="hung"')

    def has_moved() -> bool:
        return resubmissions(server, 'reason="hung"') > before

    async def hang() -> None:
        pids = {number: server.worker_pid(number) for number in (1, 2)}
        for _ in range(60):
            number = await busy_worker(server)
            pid = pids[number]
            tid = await asyncio.to_thread(busiest_thread, pid)
            with hung(tid):
                # Stopped in Python code it holds the interpreter's lock: then all hangs. And
                # between two requests it has nothing to be late with.
                if not await asyncio.to_thread(is_stuck, server, number):
                    continue
                await until(has_moved, "its requests moved", 20)
                await until(lambda: up(server) == 2, "it is not ready", 20)
                break
        assert has_moved()
        await until(lambda: up(server) == 3, "it moves again")
        assert server.worker_pid(number) == pid, "it was restarted"

    under_load(server, reference, hang)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["the worker that drains", "the worker that takes over"])
def test_a_hand_over_that_breaks_off_is_computed_again(server, reference, dies) -> None:
    before = resubmissions(server)

    async def break_off() -> None:
        pids = {number: server.worker_pid(number) for number in (1, 2)}
        number = await busy_worker(server)
        leaves, takes = pids[number], pids[3 - number]
        os.kill(leaves, signal.SIGTERM)
        await asyncio.sleep(0.05)
        os.kill(leaves if dies == "the worker that drains" else takes, signal.SIGKILL)
        await until(lambda: leaves not in server.pids(), "it ended")
        await asyncio.sleep(2.0)
        await until(lambda: up(server) == 3, "all are back")

    under_load(server, reference, break_off)
    assert resubmissions(server) > before


@pytest.mark.slow
def test_roles_are_changed_under_load(server, reference) -> None:
    async def generated() -> float:
        return await asyncio.to_thread(count, server, "quire_generation_tokens_total", 'engine="0"')

    async def change() -> None:
        await asyncio.sleep(1.0)
        before, prompts = await generated(), committed(server, 1)
        await asyncio.to_thread(control, server, 0, "role", "decode")
        await asyncio.to_thread(control, server, 1, "role", "prefill")
        await until(lambda: committed(server, 1) > prompts, "it computes prompts for others")
        async with asyncio.timeout(RESTART_S):
            while await generated() < before + 300:  # it answers now
                await asyncio.sleep(0.1)
        await asyncio.to_thread(control, server, 1, "role", "both")
        await asyncio.sleep(1.0)
        await asyncio.to_thread(control, server, 0, "role", "prefill")
        await asyncio.to_thread(control, server, 1, "role", "decode")
        prompts = committed(server, 0)
        await until(lambda: committed(server, 0) > prompts, "all is as it was")

    under_load(server, reference, change)


@pytest.mark.slow
def test_every_worker_is_restarted_and_nobody_notices(server, reference) -> None:
    moved_with_kv = 0.0

    async def restart_all() -> None:
        nonlocal moved_with_kv
        for pid in server.pids()[1:]:
            os.kill(pid, signal.SIGTERM)
            await until(lambda pid=pid: pid not in server.pids(), "it ended")
            moved_with_kv += count(server, MIGRATED, 'how="kv"')
            await until(lambda: up(server) == 3, "it is back")
            await asyncio.sleep(0.5)

    before = resubmissions(server, 'reason="draining"')
    under_load(server, reference, restart_all)
    assert resubmissions(server, 'reason="draining"') > before
    assert moved_with_kv > 0


@pytest.mark.slow
def test_a_worker_that_stays_stopped_is_replaced(server, reference) -> None:
    before = resubmissions(server)

    async def stop_one() -> None:
        pids = {number: server.worker_pid(number) for number in (1, 2)}
        victim = pids[await busy_worker(server)]
        os.kill(victim, signal.SIGSTOP)
        await until(lambda: victim not in server.pids(), "it was killed", 30)
        await until(lambda: up(server) == 3, "another is there")

    under_load(server, reference, stop_one)
    assert resubmissions(server) > before
