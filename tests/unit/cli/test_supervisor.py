"""The worker process is started, restarted, given up and ended, with a real child each time."""

import asyncio
import os
import signal
import sys
import time

import pytest
from waiting import until

from quire.cli.supervisor import Patience, Supervisor, private_folder

WORKER = """
import json, os, sys, time
options = json.loads(sys.stdin.readline())
with open(options["log"], "a") as log:
    log.write(f"{os.getpid()}\\n")
runs = len(open(options["log"]).readlines())
codes = options.get("codes", [])
if runs <= len(codes):
    sys.exit(codes[runs - 1])
if options.get("deaf"):
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
sys.stdin.read()
"""
QUICK = Patience(
    first_delay=0.01, longest_delay=0.02, calm=60, start_attempts=3, stop=10, terminate=0.2
)


@pytest.fixture
def make(tmp_path):
    log = tmp_path / "runs"
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def factory(patience=QUICK, **options):
        restarts = []
        supervisor = Supervisor(
            options={"log": str(log), **options},
            socket=tmp_path / "w.sock",
            on_restart=lambda: restarts.append(1),
            patience=patience,
            command=(sys.executable, "-S", str(script)),
        )
        return supervisor, restarts

    factory.runs = lambda: log.read_text().split() if log.exists() else []
    return factory


def gone(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


async def test_stopping_ends_the_worker_and_returns_0(make):
    supervisor, restarts = make()
    task = asyncio.create_task(supervisor.run())
    await until(make.runs)
    await supervisor.stop()
    assert await task == 0
    assert gone(make.runs()[0])
    assert restarts == []


async def test_a_worker_that_says_it_cannot_serve_is_not_tried_again(make):
    supervisor, restarts = make(codes=[2])
    assert await asyncio.wait_for(supervisor.run(), 20) == 2
    assert len(make.runs()) == 1
    assert restarts == []


async def test_a_worker_that_keeps_dying_before_it_is_ready_is_given_up(make):
    supervisor, restarts = make(codes=[7, 7, 7, 7, 7])
    assert await asyncio.wait_for(supervisor.run(), 20) == 7
    assert len(make.runs()) == QUICK.start_attempts
    assert len(restarts) == QUICK.start_attempts - 1


async def test_a_worker_that_ends_with_0_on_its_own_has_failed_too(make):
    supervisor, _ = make(codes=[0, 0, 0])
    assert await asyncio.wait_for(supervisor.run(), 20) == 1


async def test_a_ready_worker_that_is_killed_is_replaced(make):
    supervisor, restarts = make()
    task = asyncio.create_task(supervisor.run())
    for run in range(1, 6):  # more often than a start may fail
        await until(lambda run=run: len(make.runs()) == run and supervisor.pid)
        supervisor.ready()
        os.kill(supervisor.pid, signal.SIGKILL)
    await until(lambda: len(make.runs()) == 6)
    assert len(restarts) == 5
    await supervisor.stop()
    assert await task == 0


async def test_the_delay_doubles_and_stopping_cuts_it_short(make):
    patience = Patience(first_delay=0.2, longest_delay=30, start_attempts=9, stop=5, terminate=1)
    supervisor, _ = make(patience, codes=[5] * 9)
    began = time.monotonic()
    task = asyncio.create_task(supervisor.run())
    await until(lambda: len(make.runs()) == 3)
    assert time.monotonic() - began >= 0.2 + 0.4
    await until(lambda: supervisor.pid is None)
    began = time.monotonic()
    await supervisor.stop()
    assert await asyncio.wait_for(task, 5) == 0
    assert time.monotonic() - began < 0.5


async def test_a_worker_that_does_not_listen_is_killed(make):
    patience = Patience(stop=0.1, terminate=0.1)
    supervisor, _ = make(patience, deaf=True)
    task = asyncio.create_task(supervisor.run())
    await until(make.runs)
    await asyncio.sleep(0.1)
    await supervisor.stop()
    assert await asyncio.wait_for(task, 5) == 0
    assert gone(make.runs()[0])


async def test_cancelling_leaves_no_worker_behind(make):
    supervisor, _ = make(deaf=True)
    task = asyncio.create_task(supervisor.run())
    await until(make.runs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: gone(make.runs()[0]))


def test_the_sockets_lie_where_only_this_user_can_go():
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "worker-0.sock").touch()
    assert not folder.exists()


def test_a_long_temporary_folder_does_not_break_the_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with private_folder() as folder:
        assert len(str(folder / "worker-999.sock")) < 108
    assert list(deep.iterdir()) == []


class Pulse:
    """A probe that says what the test does."""

    def __init__(self) -> None:
        self.alive = True
        self.asked = 0

    async def __call__(self) -> bool:
        self.asked += 1
        return self.alive

    async def close(self) -> None:
        pass


async def test_a_ready_worker_that_does_not_answer_is_killed_even_when_stopped(make):
    patience = Patience(first_delay=0.01, probe_every=0.01, probe_misses=3)
    supervisor, restarts = make(patience)
    supervisor.probe = pulse = Pulse()
    task = asyncio.create_task(supervisor.run())
    await until(lambda: len(make.runs()) == 1)
    pulse.alive = False
    await asyncio.sleep(0.1)
    assert pulse.asked == 0, "a worker that starts answers when it can"
    supervisor.ready()
    pulse.alive = True
    await until(lambda: pulse.asked > 5)
    assert not restarts
    os.kill(supervisor.pid, signal.SIGSTOP)
    pulse.alive = False
    await until(lambda: len(make.runs()) == 2)
    assert len(restarts) == 1
    await supervisor.stop()
    assert await task == 0
