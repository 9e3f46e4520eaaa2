"""Hosts for Ray on one machine: network namespaces with their own address and /tmp on a bridge.

Each host's processes see only its own network and files in /tmp, as on a machine of its own. The
head also has its own process namespace, so that killing it takes all of it, as a pod's death does.
Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
TOKEN = "token-of-the-tests"
NETWORK = "10.91.7"
OUTSIDE = f"{NETWORK}.254"
"""This machine's own address on the bridge."""
HEAD = f"{NETWORK}.1:6379"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a-ray-token-of-at-least-some-length",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    # its agents start slowly beside everything else on this machine
    "RAY_agent_register_timeout_ms": "120000",
}
PLACED = """
import json, ray
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

ray.init("{head}", _node_ip_address="{address}", log_to_driver=False)
groups = [one["name"] for one in placement_group_table().values() if one["state"] != "REMOVED"]
actors = [one["name"] for one in list_named_actors(all_namespaces=True)]
print("placed", json.dumps(sorted(groups + actors)))
"""
LOCK = Path("/tmp/quire-test-hosts.lock")
OTHERS_S = 600.0
"""For another run of tests to be done with the hosts."""
HURRIED = ("nice", "-n", "-10")
"""A head that starts gives its agent 15 s, which is little beside busy engines on two cores."""


def can_make_namespaces() -> bool:
    """Whether this user and kernel allow it."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"quire-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


def resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@dataclass
class Host:
    """One network namespace and what was started in it."""

    name: str
    number: int
    folder: Path
    """Its /tmp."""
    processes: list[subprocess.Popen] = field(default_factory=list)
    gpus: int = 0
    """That its raylet says it has."""

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"quire-{self.name}"

    @property
    def own_etc(self) -> Path:
        """What `ip netns exec` puts over /etc."""
        return Path("/etc/netns") / self.namespace

    def make(self) -> None:
        link = f"q-{self.name}"
        # of this machine's name servers none is reached: torch's store would wait for one, by 10 s
        self.own_etc.mkdir(parents=True, exist_ok=True)
        (self.own_etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        self.folder.mkdir(parents=True)
        (self.folder / "log").touch()
        for line in (
            f"ip netns add {self.namespace}",
            f"ip link add {link} type veth peer name eth0 netns {self.namespace}",
            f"ip link set {link} master quire-br up",
            f"ip -n {self.namespace} addr add {self.address}/24 dev eth0",
            f"ip -n {self.namespace} link set eth0 up",
            f"ip -n {self.namespace} link set lo up",
            f"ip -n {self.namespace} route add default via {OUTSIDE}",
        ):
            subprocess.run(line.split(), check=True, capture_output=True)

    def start(self, *command: str, alone: bool = False, **environment: str) -> subprocess.Popen:
        """Run a command here; `alone`: in a process namespace of its own."""
        inner = f"mount --bind {self.folder} /tmp && cd / && exec " + " ".join(command)
        around = [*HURRIED, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        around = around if alone else []
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *around, "sh", "-c", inner],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=_plain() | RAY_ENVIRONMENT | {"QUIRE_CLUSTER_TOKEN": TOKEN} | environment,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def start_raylet(self, cpus: int, label: str = "") -> subprocess.Popen:
        labels = [f"--labels={label}"] if label else []
        return self.start(
            str(BIN / "ray"), "start", f"--address={HEAD}", f"--node-ip-address={self.address}",
            f"--num-cpus={cpus}", f"--num-gpus={self.gpus}", "--object-store-memory=80000000",
            *labels, "--disable-usage-stats", "--include-log-monitor=false", "--block",
        )  # fmt: skip

    def start_head(self, *more: str, **environment: str) -> subprocess.Popen:
        """`more` options go over these."""
        return self.start(
            str(BIN / "ray"), "start", "--head", f"--node-ip-address={self.address}",
            "--port=6379", "--num-cpus=0", "--num-gpus=0", "--object-store-memory=80000000",
            "--include-dashboard=false", "--disable-usage-stats", "--include-log-monitor=false",
            "--block", *more, alone=True, **environment,
        )  # fmt: skip

    def pids(self, *words: str) -> list[int]:
        """Processes of this host whose command line has all these words."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        pids = map(int, listed.stdout.split())
        return [pid for pid in pids if all(word in command_line(pid) for word in words)]

    def kill(self, *words: str) -> list[int]:
        """SIGKILL to those processes."""
        found = self.pids(*words)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def _plain() -> dict[str, str]:
    names = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: os.environ[name] for name in names if name in os.environ}


@contextlib.contextmanager
def hosts(*names: str, base: Path):
    """Hosts by name, the first being the head's. Everything in them is killed in the end.

    One run has them at a time on a machine; another waits.
    """
    with _alone(), _hosts(names, base) as made:
        yield made


@contextlib.contextmanager
def _alone():
    """Raises TimeoutError naming the run that does not end."""
    with LOCK.open("a+") as lock:
        deadline = time.monotonic() + OTHERS_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = LOCK.read_text().strip()
                    raise TimeoutError(
                        f"process {owner} has the hosts of these tests for {OTHERS_S:.0f} s: one "
                        "run has them at a time, end that one or try again later"
                    ) from None
            time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def _hosts(names: tuple[str, ...], base: Path):
    _clean(names)
    subprocess.run(["ip", "link", "add", "quire-br", "type", "bridge"], check=True)
    subprocess.run(f"ip addr add {OUTSIDE}/24 dev quire-br".split(), check=True)
    subprocess.run(["ip", "link", "set", "quire-br", "up"], check=True)
    made = {name: Host(name, i, base / name) for i, name in enumerate(names, start=1)}
    try:
        for host in made.values():
            host.make()
        yield made
    finally:
        for host in made.values():
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for host in made.values():
            for process in host.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        _clean(names)


def _clean(names) -> None:
    for name in names:
        # the link lives on while a process of the namespace does
        for line in (f"ip link del q-{name}", f"ip netns del quire-{name}"):
            subprocess.run(line.split(), capture_output=True, check=False)
        shutil.rmtree(f"/etc/netns/quire-{name}", ignore_errors=True)
    subprocess.run(["ip", "link", "del", "quire-br"], capture_output=True, check=False)


def _run(host: Host, *command: str) -> subprocess.CompletedProcess[str]:
    inner = f"mount --bind {host.folder} /tmp && cd / && exec " + " ".join(command)
    return subprocess.run(
        ["ip", "netns", "exec", host.namespace, "sh", "-c", inner],
        capture_output=True, text=True, timeout=120, check=False,
        env=_plain() | RAY_ENVIRONMENT | {"QUIRE_CLUSTER_TOKEN": TOKEN},
    )  # fmt: skip


def ray(host: Host, *words: str) -> str:
    """Run `ray ...` there; what it printed."""
    done = _run(host, str(BIN / "ray"), *words, f"--address={HEAD}")
    return done.stdout + done.stderr


def quire(host: Host, *words: str, ok: bool = True) -> str:
    """Run `quire ...` there; what it printed."""
    done = _run(host, sys.executable, "-m", "quire", *words)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def ended(host: Host, *command: str) -> tuple[int, str]:
    """Run a command there to its end: its exit code, and what it printed."""
    done = _run(host, *command)
    return done.returncode, done.stdout + done.stderr


def placed(host: Host) -> list[str]:
    """Names of the placement groups and of the named actors of the cluster, asked from a node."""
    (host.folder / "placed.py").write_text(PLACED.format(head=HEAD, address=host.address))
    code, said = ended(host, sys.executable, "-P", "/tmp/placed.py")
    assert code == 0, said
    [line] = [line for line in said.splitlines() if line.startswith("placed ")]
    names: list[str] = json.loads(line.removeprefix("placed "))
    return names


def write_fleet(host: Host, content: dict) -> str:
    """A fleet file in the host's /tmp; its path there."""
    (host.folder / "fleet.yaml").write_text(json.dumps(content))
    return "/tmp/fleet.yaml"
