"""A supervisor and its real engine, without Ray: restarts, adoption, draining, refusals."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from kept_figures import show

from quire import demo
from quire.coordinator import companion as companion_module
from quire.coordinator import files, probing
from quire.coordinator import supervisor as supervisor_module
from quire.coordinator.companion import ASK_S, Companion
from quire.coordinator.reconcile import State
from quire.coordinator.supervisor import Assignment, Report, StaleTerm, Supervisor

LIMIT_S = 90


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Engines' folders of this test alone."""
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def assignment(**fields) -> Assignment:
    options = {
        "model": "demo", "max_model_len": 128, "num_threads": 1,
        "kv_cache_memory_bytes": 8 << 20, "log_level": "warning",
    }  # fmt: skip
    base = Assignment(
        fleet="f", pod="p-0", term=5, digest="d", role="decode", host="127.0.0.1", port=0,
        orphan_s=60, drain_s=5, options=options, cluster={"cluster_token": "t"},
    )  # fmt: skip
    return replace(base, **fields)


def wait_for(supervisor: Supervisor, true):
    deadline = time.monotonic() + LIMIT_S
    while not true(supervisor.report()):
        assert time.monotonic() < deadline, supervisor.report()
        time.sleep(0.05)
    return supervisor.report()


def stop(supervisor: Supervisor) -> None:
    supervisor.stop(99)
    deadline = time.monotonic() + LIMIT_S
    while not supervisor.is_stopped():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_ready(report) -> bool:
    return report.state is State.READY


def test_an_engine_is_restarted_in_place_adopted_and_drained(own_folder):
    first = Supervisor(assignment())
    started = wait_for(first, is_ready)
    assert (started.role, started.restarts, started.adopted) == ("decode", 0, False)
    assert started.startup_s > 0
    assert started.resident_bytes > 50e6

    os.kill(started.pid, signal.SIGKILL)
    again = wait_for(first, lambda r: is_ready(r) and r.restarts == 1)
    assert again.address == started.address
    assert again.pid != started.pid

    first.set_role(6, "prefill")
    assert first.report().role == "prefill"
    with pytest.raises(StaleTerm):
        first.set_role(5, "decode")
    with pytest.raises(StaleTerm):
        first.stop(5)

    # another supervisor finds it, with the role that was set, and the term that it was told
    second = Supervisor(assignment(term=7))
    adopted = wait_for(second, is_ready)
    assert adopted.adopted
    assert (adopted.pid, adopted.role) == (again.pid, "prefill")

    first._stopping.set()  # the first one's process would have been gone
    stop(second)
    assert not files.identity(adopted.pid)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "no-such-model"}, "no model folder at 'no-such-model'"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size=4 does not fit this model"),
        ({"max_model_len": "much"}, "max_model_len"),
    ],
)
def test_what_cannot_be_served_is_said_and_not_tried_again(own_folder, options, words):
    supervisor = Supervisor(assignment(options=assignment().options | options))
    report = wait_for(supervisor, lambda r: r.state is State.REFUSED)
    assert words in report.reason
    assert "\n" not in report.reason
    assert (report.pid, report.restarts) == (0, 0)
    stop(supervisor)


def test_a_model_that_is_not_here_is_named_and_served_once_it_is(own_folder, monkeypatch):
    """Its volume is mounted later; taken away and mounted again."""
    monkeypatch.setattr(supervisor_module, "LONGEST_DELAY_S", 0.5)
    model = own_folder / "model"
    said = f"{model} is not on node 127.0.0.1: copy it there, or keep pool p off that node"
    supervisor = Supervisor(assignment(options=assignment().options | {"model": str(model)}))
    failed = wait_for(supervisor, lambda r: r.state is State.FAILED)
    assert said in failed.reason
    assert (failed.pid, failed.restarts) == (0, 0)
    model.symlink_to(demo.path())
    started = wait_for(supervisor, is_ready)
    model.unlink()
    os.kill(started.pid, signal.SIGKILL)
    failed = wait_for(supervisor, lambda r: r.state is State.FAILED)
    assert said in failed.reason
    model.symlink_to(demo.path())
    wait_for(supervisor, is_ready)
    stop(supervisor)


def test_a_hub_that_is_away_is_asked_again(own_folder, monkeypatch):
    """The engine cannot have its model now: that is no refusal."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(own_folder / "hub"))
    supervisor = Supervisor(assignment(options=assignment().options | {"model": "org/model"}))
    report = wait_for(supervisor, lambda r: r.restarts == 2)
    assert report.state is State.RESTARTING
    assert report.reason.startswith("org/model is not in the local hub cache, and the hub cannot")
    assert "\n" not in report.reason
    stop(supervisor)


def test_an_engine_that_is_stopped_while_it_loads_is_replaced(own_folder, monkeypatch):
    supervisor = Supervisor(assignment())
    first = wait_for(supervisor, lambda r: r.pid)
    os.kill(first.pid, signal.SIGSTOP)
    with monkeypatch.context() as hurried:
        hurried.setattr(probing, "LOADING_SILENCE_S", 1.0)
        wait_for(supervisor, lambda r: r.restarts == 1)
    again = wait_for(supervisor, lambda r: is_ready(r) and r.restarts == 1)
    assert again.pid != first.pid
    assert files.identity(first.pid) is None
    stop(supervisor)


def test_a_process_of_another_host_that_is_stopped_before_it_meets_rank_0_is_replaced(
    own_folder, monkeypatch
):
    monkeypatch.setattr(companion_module, "STOPPED_LOOKS", 2)
    one = assignment(options=assignment().options | {"tensor_parallel_size": 2}, nodes=2, node=1)
    rank0 = Report(State.STARTING, "d", "both", master="127.0.0.1:1", pid=7)
    companion = Companion(one, "127.0.0.1", lambda: rank0)
    waiting = wait_for(companion, lambda r: r.state is State.READY)
    os.kill(waiting.pid, signal.SIGSTOP)
    again = wait_for(companion, lambda r: r.state is State.READY and r.pid != waiting.pid)
    assert files.identity(waiting.pid) is None
    assert again.restarts == 1
    stop(companion)


def test_a_port_that_is_taken_is_named(own_folder):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        supervisor = Supervisor(assignment(port=port))
        report = wait_for(supervisor, lambda r: r.state is State.FAILED)
    assert f"port {port} of 127.0.0.1 cannot be listened on" in report.reason
    assert "give the pool another port" in report.reason
    stop(supervisor)


def test_the_ranks_of_two_hosts_are_started_again_as_one(own_folder):
    options = assignment().options | {"tensor_parallel_size": 2}
    one = assignment(options=options, nodes=2)
    first = Supervisor(one)
    second = Companion(replace(one, node=1), "127.0.0.1", first.report)
    started = wait_for(first, is_ready)
    assert second.report().pid != started.pid
    whole = started.with_others([second.report()])
    assert whole.resident_bytes > started.resident_bytes + 50e6

    [rank] = children(second.report().pid)
    os.kill(rank, signal.SIGKILL)
    again = wait_for(first, lambda r: is_ready(r) and r.restarts == 1)
    assert again.address == started.address
    assert again.pid != started.pid
    assert files.identity(rank) is None

    # rank 0's supervisor has found another place for it, and nobody told the other's
    moved = replace(again, master="127.0.0.1:1")
    second._ask = lambda: moved
    waiting = wait_for(second, lambda r: r.master == moved.master)
    second._ask = first.report
    wait_for(second, lambda r: r.pid not in (0, waiting.pid) and r.master == first.report().master)
    wait_for(first, lambda r: is_ready(r) and r.restarts == 2)

    pids = [first.report().pid, second.report().pid, *children(second.report().pid)]
    for each in (first, second):
        each.stop(99)
    stop(first)
    stop(second)
    assert [files.identity(pid) for pid in pids] == [None] * 3


def test_another_hosts_process_that_hangs_does_not_outlast_rank_0(own_folder):
    """It waits for a rank 0 that does not listen, and is stopped; then rank 0 is another."""
    one = assignment(options=assignment().options | {"tensor_parallel_size": 2}, nodes=2, node=1)
    rank0 = Report(State.STARTING, "d", "both", master="127.0.0.1:1")
    reports = [rank0]
    companion = Companion(one, "127.0.0.1", lambda: reports[-1])
    time.sleep(2 * ASK_S)
    assert companion.report().pid == 0, "started before rank 0"
    reports.append(replace(rank0, pid=7))
    waiting = wait_for(companion, lambda r: r.state is State.READY)
    os.kill(waiting.pid, signal.SIGSTOP)
    reports.append(replace(rank0, pid=0))  # between two
    time.sleep(2 * ASK_S)
    assert companion.report().pid == waiting.pid
    reports.append(replace(rank0, pid=8))
    again = wait_for(companion, lambda r: r.state is State.READY and r.pid != waiting.pid)
    assert files.identity(waiting.pid) is None
    assert again.restarts == 1
    stop(companion)


@pytest.mark.slow
def test_an_engine_that_is_stopped_is_replaced(own_folder):
    supervisor = Supervisor(assignment())
    started = wait_for(supervisor, is_ready)
    os.kill(started.pid, signal.SIGSTOP)
    again = wait_for(supervisor, lambda r: is_ready(r) and r.restarts == 1)
    assert again.pid != started.pid
    assert files.identity(started.pid) is None
    stop(supervisor)


@pytest.mark.slow
def test_a_stopped_process_of_another_host_is_replaced_with_the_ranks(own_folder):
    one = assignment(options=assignment().options | {"tensor_parallel_size": 2}, nodes=2)
    first = Supervisor(one)
    second = Companion(replace(one, node=1), "127.0.0.1", first.report)
    wait_for(first, is_ready)
    node = second.report().pid
    began = time.monotonic()
    os.kill(node, signal.SIGSTOP)
    wait_for(first, lambda r: is_ready(r) and r.restarts == 1)
    show("a replica of two, one process stopped", ready_again_after_s=time.monotonic() - began)
    assert files.identity(node) is None
    assert second.report().restarts == 1
    for each in (first, second):
        each.stop(99)
    stop(first)
    stop(second)


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]
