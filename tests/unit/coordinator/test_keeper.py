"""The keeper's engine outlives whoever had it started, is found again, and is never forgotten."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from waiting import wait_until

from quire.coordinator import engine_process, files
from quire.coordinator.files import Identity

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def run_keeper(folder, code: str, orphan_s: float = 60.0):
    """Through a parent that is gone afterwards; the engine, or None when it ended at once."""
    files.renew_lease(folder)
    facts = {"address": "127.0.0.1:1", "digest": "d", "gpus": None}
    command = [sys.executable, "-c", code]
    files.write_json(
        folder / files.LAUNCH, {"command": command, "orphan_s": orphan_s, "facts": facts}
    )
    keeper = [sys.executable, "-P", "-m", "quire.coordinator.keeper", str(folder)]
    subprocess.run(keeper, check=True, timeout=30, start_new_session=True)
    wait_until((folder / files.ENGINE).exists)
    return engine_process.find(folder)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    engine = engine_process.find(tmp_path)
    if engine is not None:
        engine_process.kill(engine)
        wait_until((tmp_path / files.EXIT).exists)


def test_an_engine_runs_on_and_is_found_again(folder):
    engine = run_keeper(folder, SLEEPER)
    assert engine is not None
    assert engine == engine_process.find(folder)
    assert os.getsid(engine.process.pid) not in (os.getsid(0), os.getpid())
    log = folder / files.LOG
    wait_until(lambda: log.exists() and log.read_text() == "up\n")


def test_how_it_ended_is_recorded(folder):
    engine = run_keeper(folder, SLEEPER)
    engine_process.kill(engine)
    wait_until((folder / files.EXIT).exists)
    assert engine_process.find(folder) is None
    ended = engine_process.exit_of(folder, engine)
    assert ended.code == -signal.SIGKILL
    assert ended.reason == "the engine was killed by SIGKILL"


def test_an_engine_that_cannot_serve_is_quoted(folder):
    run_keeper(folder, "import sys; print('quire: error: no such model'); sys.exit(2)")
    wait_until((folder / files.EXIT).exists)
    about = files.read_json(folder / files.EXIT)
    ended = engine_process.Exit(about["code"], tuple(about["last_lines"]))
    assert ended.reason == "no such model"


def test_an_engine_without_a_supervisor_is_ended(folder):
    engine = run_keeper(folder, SLEEPER, orphan_s=0.5)
    assert engine is not None
    wait_until((folder / files.EXIT).exists)
    assert files.read_json(folder / files.EXIT)["code"] == -signal.SIGTERM


def test_an_engine_whose_keeper_is_killed_is_told_to_end(folder):
    engine = run_keeper(folder, SLEEPER)
    files.signal_process(engine.keeper, signal.SIGKILL)
    wait_until(lambda: not engine.is_alive)
    assert engine_process.exit_of(folder, engine).code is None


def test_another_process_with_the_same_number_is_not_it():
    own = files.identity(os.getpid())
    assert own is not None
    assert files.is_alive(own)
    assert not files.is_alive(Identity(own.pid, own.started + 1))


def test_a_lease_that_is_being_renewed_is_never_old(tmp_path):
    files.renew_lease(tmp_path)
    done = threading.Event()

    def renew() -> None:
        while not done.is_set():
            files.renew_lease(tmp_path)

    thread = threading.Thread(target=renew)
    thread.start()
    ages = [files.lease_age_s(tmp_path) for _ in range(2000)]
    done.set()
    thread.join()
    assert max(ages) < 30


def test_a_missing_lease_is_old(tmp_path):
    assert files.lease_age_s(tmp_path) == float("inf")


def test_a_port_in_use_is_named_with_what_to_change():
    taken = engine_process.free_port("127.0.0.1", 0)
    with (
        socket.create_server(("127.0.0.1", taken)),
        pytest.raises(OSError, match=f"port {taken} of 127.0.0.1 .* give the pool another port"),
    ):
        engine_process.free_port("127.0.0.1", taken)


def test_a_folder_that_others_may_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(files.tempfile, "tempdir", None)
    (tmp_path / f"quire-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"quire-{os.getuid()}").chmod(0o777)
    with pytest.raises(OSError, match="open to others"):
        files.engine_folder("f", "p-0")
