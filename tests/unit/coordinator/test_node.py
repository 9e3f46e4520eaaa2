"""A node keeps Ray running, and drains its engines only once Ray is gone. Ray is a script here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from waiting import wait_until

from quire.config.node import NodeConfig
from quire.coordinator import engine_process, files
from quire.coordinator.engine_logs import EngineLogs
from quire.coordinator.node import start_command

RAY = """
import os, signal, subprocess, sys, time
base = os.environ["BASE"]
def note(what):
    with open(base + "/notes", "a") as file:
        file.write(what + "\\n")
note("ray " + str(os.getpid()) + " " + os.environ["RAY_AUTH_MODE"])
raylet = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
note("raylet " + str(raylet.pid))
engine = os.environ["ENGINE"]
if not os.path.exists(engine + "/engine.json"):  # as a supervisor does it, the first time
    subprocess.run([sys.executable, "-P", "-m", "quire.coordinator.keeper", engine], check=True)
def end(*_):
    note("ray ends")
    raylet.kill()
    raylet.wait()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
while True:
    time.sleep(0.05)
"""
ENGINE = """
import signal, sys, time
def end(*_):
    with open(sys.argv[1], "a") as file:
        file.write("engine ends\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("engine is up", flush=True)
time.sleep(60)
"""


class LocalNode:
    """`quire node` with a Ray that is a script, and an engine that is one."""

    def __init__(self, base) -> None:
        scripts = base / "path" / "ray" / "scripts"
        scripts.mkdir(parents=True)
        for folder in (scripts.parent, scripts):
            (folder / "__init__.py").touch()
        (scripts / "scripts.py").write_text(RAY)
        self.notes = base / "notes"
        self.engine = base / "tmp" / f"quire-{os.getuid()}" / "f" / "decode-0"
        self.engine.mkdir(parents=True)
        command = [sys.executable, "-c", ENGINE, str(self.notes)]
        facts = {"address": "127.0.0.1:1", "digest": "d", "gpus": None}
        launch = {"command": command, "orphan_s": 60.0, "facts": facts}
        files.write_json(self.engine / files.LAUNCH, launch)
        files.renew_lease(self.engine)
        paths = os.pathsep.join([str(base / "path"), *sys.path])
        environment = os.environ | {
            "BASE": str(base), "ENGINE": str(self.engine), "TMPDIR": str(base / "tmp"),
            "PYTHONPATH": paths, "RAY_AUTH_TOKEN": "secret",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire", "node", "--join", "127.0.0.1:1"],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(lambda: engine_process.find(self.engine) is not None)

    def noted(self, word: str) -> list[str]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line for line in lines if line.startswith(word)]


@pytest.fixture
def node(tmp_path):
    node = LocalNode(tmp_path)
    yield node
    if node.process.poll() is None:
        node.process.send_signal(signal.SIGTERM)
        node.process.communicate(timeout=30)
    assert engine_process.find(node.engine) is None


def test_the_engine_outlives_ray_which_is_started_again(node):
    engine = engine_process.find(node.engine)
    ray, raylet = (int(node.noted(word)[0].split()[1]) for word in ("ray ", "raylet"))
    os.kill(ray, signal.SIGKILL)
    wait_until(lambda: len(node.noted("ray ")) == 2)
    assert files.identity(raylet) is None, "what a dead Ray leaves is ended"
    assert engine_process.find(node.engine) == engine
    assert node.noted("ray ")[0].endswith(" token")


def test_at_the_end_ray_goes_first_and_the_engine_may_drain(node):
    node.process.send_signal(signal.SIGTERM)
    output, _ = node.process.communicate(timeout=30)
    assert node.process.returncode == 0
    assert node.noted("ray ends") + node.noted("engine ends") == ["ray ends", "engine ends"]
    assert node.notes.read_text().splitlines()[-1] == "engine ends"
    assert "engine is up" in output, "engines' lines are in the pod's log"


def test_without_a_secret_for_ray_it_is_refused():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "quire", "node"], env=environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_head_and_a_node_that_joins_it():
    head = start_command(NodeConfig(address="10.0.0.1"))
    assert {"--head", "--port=6379", "--num-cpus=0", "--node-ip-address=10.0.0.1"} <= set(head)
    config = NodeConfig(join="head:6379", cpus=2, gpus=1, node_label=("quire.pool=decode", "a=b"))
    joined = start_command(config)
    assert "--head" not in joined
    assert {"--address=head:6379", "--num-cpus=2", "--num-gpus=1"} <= set(joined)
    assert "--labels=quire.pool=decode,a=b" in joined
    with pytest.raises(ValueError, match="KEY=VALUE"):
        NodeConfig(node_label=("decode",))


def test_only_a_head_has_a_dashboard_and_only_when_asked():
    head = start_command(NodeConfig(address="10.0.0.1"))
    assert "--include-dashboard=false" in head
    assert not any(word.startswith("--dashboard-host") for word in head)
    shown = start_command(NodeConfig(address="10.0.0.1", dashboard=True))
    assert {"--include-dashboard=true", "--dashboard-host=10.0.0.1"} <= set(shown)
    with pytest.raises(ValueError, match="only the head has one"):
        NodeConfig(join="head:6379", dashboard=True)


def test_a_log_that_is_replaced_is_copied_to_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = files.engine_folder("f", "p-0")
    files.write_json(folder / files.ENGINE, {})
    log = folder / files.LOG
    log.write_text("of an earlier process\n")
    with (tmp_path / "out").open("wb") as out:
        logs = EngineLogs(out)
        with log.open("a") as file:
            file.write("one\n")
        logs.copy()
        with log.open("a") as file:
            file.write("two\n")
        log.replace(folder / "engine.log.1")
        logs.copy()
        log.write_text("three\n")
        logs.copy()
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"
