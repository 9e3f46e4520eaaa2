"""`quire doctor`: findings say what to change, and the exit code follows them."""

import json
import socket
import sys

import pytest

from quire.cli import checks, doctor
from quire.cli.checks import Check
from quire.cli.pairs import Pair, mismatch
from quire.proto import worker_pb2

OK, WARN = Check("a", "ok", "fine"), Check("b", "warn", "meh", "do this")
FAIL = Check("c", "fail", "broken", "mend it")


@pytest.fixture
def machine(monkeypatch):
    """Sets what is found on this machine."""

    def found(*findings):
        monkeypatch.setattr(checks, "machine", lambda: iter(findings))

    monkeypatch.delenv("QUIRE_CLUSTER_TOKEN", raising=False)
    return found


@pytest.mark.parametrize(
    ("findings", "code"), [((OK,), 0), ((OK, WARN), 0), ((OK, WARN, FAIL), 1)], ids=str
)
def test_only_a_failure_fails(machine, capsys, findings, code):
    machine(*findings)
    assert doctor.run([]) == code
    out = capsys.readouterr().out
    for check in findings:
        assert f"{check.level:<4}  {check.name}  {check.found}" in out
        assert f"-> {check.advice}" in out or not check.advice
    assert doctor.run(["--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    assert [x["level"] for x in report["machine"]] == [x.level for x in findings]


def test_a_pair_that_cannot_be_measured_is_a_failure():
    good = Pair("a", "b", "tcp", 1.234, 0.1, 0.2, 33.0)
    bad = Pair("b", "a", "tcp", problem="unreachable: no answer in time")
    assert doctor.Report([OK], [OK], [good]).ok
    report = doctor.Report([OK], [OK], [good, bad])
    assert not report.ok
    lines = list(doctor.describe(report))
    assert "a     b   tcp  1.23  0.10    0.20    33.00         same" in lines
    assert any(line.startswith("b") and "no answer in time" in line for line in lines)


def test_this_machine_can_be_looked_at():
    found = {check.name: check for check in checks.machine()}
    assert {"CPU kernels", "memory", "/dev/shm", "nixl", "GPUs", "port 8000"} <= found.keys()
    for check in found.values():
        assert check.found
        assert bool(check.advice) == (check.level != "ok"), check


def test_a_taken_port_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = checks.port(8000)
        assert check.name == "port 8000"
        checks.PORTS[number] = "quire worker --listen"
        try:
            check = checks.port(number)
        finally:
            del checks.PORTS[number]
    assert (check.level, check.advice) == ("warn", "choose another: quire worker --listen")


def test_a_small_quota_names_the_number_of_threads(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(checks, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(checks.os, "sched_getaffinity", lambda _: range(8), raising=False)
    check = checks.cpus()
    assert check.level == "warn" and check.advice.endswith("--num-threads 1")
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert checks.cpus().level == "ok"


def test_a_containers_limit_counts_and_not_the_hosts_memory(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 100000000 kB\nMemAvailable: 90000000 kB\n",
        "/sys/fs/cgroup/memory.max": str(2 << 30),
        "/sys/fs/cgroup/memory.current": str(1 << 30),
    }
    monkeypatch.setattr(checks, "_read", lambda path: files.get(path, ""))
    check = checks.memory()
    assert check.level == "warn" and "1.0 GiB up to the container's limit" in check.found
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert checks.memory().level == "ok"


def test_a_driver_that_fails_is_a_failure(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = checks.gpus()
    assert (check.level, check.found) == ("fail", "no devices were found")


def test_a_library_that_aborts_does_not_take_doctor_along(monkeypatch):
    monkeypatch.setattr(checks, "_NIXL", "import os; os.abort()")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: sys)
    assert checks.nixl().level == "warn"


def test_mistakes_on_the_command_line_are_named(capsys, machine):
    machine()
    for argv, message in (
        (["nonsense"], "host:port"),
        (["a:1", "a:1"], "given twice"),
        (["--probe-bytes", "1G"], "1M to 256M"),
    ):
        with pytest.raises(SystemExit) as caught:
            doctor.run(argv)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_what_differs_between_two_layouts_is_named():
    a = worker_pb2.ModelInfo(kv={"wire_version": 1, "fingerprint": b"1", "layout": "x=1 y=2"})
    b = worker_pb2.ModelInfo(kv={"wire_version": 1, "fingerprint": b"2", "layout": "x=1 y=3"})
    assert mismatch(a, a) == ""
    assert mismatch(a, b) == "y=3 here y=2"
    b.kv.wire_version = 2
    assert mismatch(a, b) == "wire version 2 here 1"
