"""Workers that end, stop for ever or change their role under steady load: no request fails, every
text is that of a calm run, and sequences that leave a worker in good order take their KV along."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from hang import busiest_thread, hung
from server import running_server
from test_continuation import request_body, resubmissions, texts_of
from waiting import wait_until

from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

FLAGS = (
    "--prefill", "1", "--decode", "2", "--max-model-len", "512", "--kv-cache-memory-bytes", "32M",
    "--num-threads", "1", "--kv-lease-s", "10", "--kv-heartbeat-s", "2", "--cluster-token", "t",
    "--max-step-age", "4",
)  # fmt: skip
NUMBERS = range(40)
AT_ONCE = 8
RESTART_S = 60
MIGRATED = "quire_migrated_sequences_total"


@pytest.fixture(scope="module")
def server():
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


def forget_prefixes(server, number: int) -> None:
    ask(server, number, worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache()))


def ask(server, number: int, request):
    [socket] = Path(server.folder).glob(f"quire-*/worker-{number}.sock")
    token = (("authorization", "Bearer t"),)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        return WorkerStub(channel).Control(request, timeout=1, metadata=token)


def worker_pid(server, number: int) -> int:
    """The process that listens on the worker's socket."""
    for pid in server.pids()[1:]:
        inodes = set()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                inodes.add(str(fd.readlink()))
        for line in Path("/proc/net/unix").read_text().splitlines():
            if line.endswith(f"/worker-{number}.sock") and f"socket:[{line.split()[6]}]" in inodes:
                return pid
    raise AssertionError(f"worker {number} is not there")


@pytest.fixture(scope="module")
def calm(server):
    """The texts of an undisturbed run, by request."""

    async def ask_all():
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(number: int):
            async with limit:
                return await texts_of(server.port, request_body(number))

        return await asyncio.gather(*(one(number) for number in NUMBERS))

    return asyncio.run(ask_all())


def up(server) -> float:
    return server.metric("quire_gateway_worker_up")


def samples(server, start: str, *parts: str) -> list[float]:
    lines = server.get("/metrics").splitlines()
    mine = [x for x in lines if x.startswith(start) and all(part in x for part in parts)]
    return [float(line.rsplit(" ", 1)[1]) for line in mine]


async def busy_worker(server) -> int:
    """Number of a decode worker that answers several requests: the router may use one alone."""

    def running(number: int) -> float:
        return sum(samples(server, "quire_requests_running{", f'engine="{number}"'))

    async with asyncio.timeout(RESTART_S):
        while True:
            for number in (1, 2):
                if await asyncio.to_thread(running, number) >= 3:
                    return number
            await asyncio.sleep(0.05)


@asynccontextmanager
async def steady_load(server, calm):
    """Requests without a pause; each answer is compared."""
    over, count = asyncio.Event(), 0

    async def client(first: int) -> None:
        nonlocal count
        number = first
        while not over.is_set():
            got = await texts_of(server.port, request_body(number))
            assert got == calm[number], f"request {number}: {request_body(number)}"
            number = (number + AT_ONCE) % len(calm)
            count += 1

    async with asyncio.TaskGroup() as clients:
        for i in range(AT_ONCE):
            clients.create_task(client(i))
        try:
            yield
        finally:
            over.set()
    assert count > AT_ONCE, "there was no load"


async def until(condition, what: str, seconds: float = RESTART_S) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def assert_nothing_is_left(server) -> None:
    def held() -> bool:
        owned = samples(server, "quire_kv_blocks{", 'state="owned"')
        return len(owned) == 3 and not any(owned)

    wait_until(held, "no block is owned", 30)


def test_a_decode_worker_that_ends_hands_over_its_sequences_with_their_blocks(server, calm) -> None:
    async def run() -> int:
        async with steady_load(server, calm):
            pids = {number: worker_pid(server, number) for number in (1, 2)}
            leaves = await busy_worker(server)
            # requests are the same again and again: what is cached there would not have to move
            await asyncio.to_thread(forget_prefixes, server, 3 - leaves)
            os.kill(pids[leaves], signal.SIGTERM)
            await until(lambda: pids[leaves] not in server.pids(), "it ended")
            await until(lambda: up(server) == 3, "it is back")
            return 3 - leaves

    # What moves with few blocks missing is recomputed; how much runs at that moment is chance.
    for _ in range(5):
        engine = f'engine="{asyncio.run(run())}"'
        if sum(samples(server, MIGRATED, engine, 'how="kv"')) > 0:
            break
    assert sum(samples(server, MIGRATED, engine, 'how="kv"')) > 0
    assert sum(samples(server, "quire_migrated_blocks_total", engine)) > 0
    assert_nothing_is_left(server)


@pytest.mark.slow
def test_requests_leave_an_engine_that_hangs(server, calm) -> None:
    def moved() -> float:
        return sum(samples(server, "quire_gateway_resubmissions_total", 'reason="hung"'))

    before = moved()

    async def run() -> None:
        async with steady_load(server, calm):
            pids = {number: worker_pid(server, number) for number in (1, 2)}
            for _ in range(60):
                number = await busy_worker(server)
                pid = pids[number]
                tid = await asyncio.to_thread(busiest_thread, pid)
                with hung(tid):
                    # Stopped in Python code it holds the interpreter's lock: then all hangs. And
                    # between two requests it has nothing to be late with.
                    if not await asyncio.to_thread(is_stuck, server, number):
                        continue
                    await until(lambda: moved() > before, "its requests moved", 20)
                    await until(lambda: up(server) == 2, "it is not ready", 20)
                    break
            assert moved() > before
            await until(lambda: up(server) == 3, "it moves again")
            assert worker_pid(server, number) == pid, "it was restarted"

    asyncio.run(run())
    assert_nothing_is_left(server)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["the worker that drains", "the worker that takes over"])
def test_a_hand_over_that_breaks_off_is_computed_again(server, calm, dies) -> None:
    async def run() -> None:
        async with steady_load(server, calm):
            pids = {number: worker_pid(server, number) for number in (1, 2)}
            number = await busy_worker(server)
            leaves, takes = pids[number], pids[3 - number]
            os.kill(leaves, signal.SIGTERM)
            await asyncio.sleep(0.05)
            os.kill(leaves if dies == "the worker that drains" else takes, signal.SIGKILL)
            await until(lambda: leaves not in server.pids(), "it ended")
            await asyncio.sleep(2.0)
            await until(lambda: up(server) == 3, "all are back")

    asyncio.run(run())
    assert_nothing_is_left(server)


@pytest.mark.slow
def test_roles_are_changed_under_load(server, calm) -> None:
    def generated() -> float:
        return sum(samples(server, "quire_generation_tokens_total", 'engine="0"'))

    async def run() -> None:
        async with steady_load(server, calm):
            await asyncio.sleep(1.0)
            before = await asyncio.to_thread(generated)
            await asyncio.to_thread(control, server, 0, "role", "decode")
            await asyncio.to_thread(control, server, 1, "role", "prefill")
            await until(lambda: generated() > before + 300, "it answers now")
            await asyncio.to_thread(control, server, 1, "role", "both")
            await asyncio.sleep(1.0)
            await asyncio.to_thread(control, server, 0, "role", "prefill")
            await asyncio.to_thread(control, server, 1, "role", "decode")
            await asyncio.sleep(1.0)

    asyncio.run(run())
    assert_nothing_is_left(server)


@pytest.mark.slow
def test_every_worker_is_restarted_and_nobody_notices(server, calm) -> None:
    moved_with_kv = 0.0

    async def restart_all() -> None:
        nonlocal moved_with_kv
        for pid in server.pids()[1:]:
            os.kill(pid, signal.SIGTERM)
            await until(lambda pid=pid: pid not in server.pids(), "it ended")
            moved_with_kv += sum(samples(server, MIGRATED, 'how="kv"'))
            await until(lambda: up(server) == 3, "it is back")
            await asyncio.sleep(0.5)

    async def run() -> None:
        async with steady_load(server, calm):
            await restart_all()

    before = samples(server, "quire_gateway_resubmissions_total", 'reason="draining"')
    asyncio.run(run())
    after = samples(server, "quire_gateway_resubmissions_total", 'reason="draining"')
    assert sum(after) > sum(before)
    assert moved_with_kv > 0
    assert_nothing_is_left(server)


@pytest.mark.slow
def test_a_worker_that_stays_stopped_is_replaced(server, calm) -> None:
    before = resubmissions(server)

    async def run() -> None:
        async with steady_load(server, calm):
            pids = {number: worker_pid(server, number) for number in (1, 2)}
            victim = pids[await busy_worker(server)]
            os.kill(victim, signal.SIGSTOP)
            await until(lambda: victim not in server.pids(), "it was killed", 30)
            await until(lambda: up(server) == 3, "another is there")

    asyncio.run(run())
    assert resubmissions(server) > before
    assert_nothing_is_left(server)
