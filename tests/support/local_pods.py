"""Pods of a render as processes of this machine: their commands, environment and mounted files.

A pod has a loopback address of its own, so that all use the ports they use in a cluster. Names of
pods become those addresses, and mount paths become folders; nothing else of a pod is changed. Where
root is to be had, names stay, and so does /tmp: each pod has its own, as its hosts file, and the
files of its account where it may ask Kubernetes.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from manifests import NAMESPACE, ROOT, Render, pod_templates

ENTRYPOINT = str(Path(sys.executable).parent / "quire")
"""What the images start."""
FIRST_ADDRESS = 16
CPUS = "1"
_SUBNETS = itertools.count(77)
"""Each release has its own: several run at a time, also in other processes of the tests."""
MOUNTS = "/mnt"
"""Where a pod of its own mounts has its volumes, /tmp excepted."""
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"
INIT_S = 60


@dataclass
class LocalPod:
    """One container of a pod, started or not. Those of a pod share its address and its volumes."""

    name: str
    address: str
    template: dict
    folder: Path
    release: LocalRelease
    number: int = 0
    injected: dict[str, str] = field(default_factory=dict)
    """Environment that whoever makes the pod adds to that of its template."""
    network: str = ""
    """Namespace that its address is in, this machine's own by default."""
    process: subprocess.Popen | None = None
    files: dict[str, Path] = field(default_factory=dict)
    """Path of a mount -> the volume's folder, as the process sees it."""

    @property
    def spec(self) -> dict:
        return self.template["spec"]

    @property
    def container(self) -> dict:
        return self.spec["containers"][self.number]

    @property
    def role(self) -> str:
        return self.template["metadata"]["labels"]["app.kubernetes.io/component"]

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def _log_path(self) -> Path:
        return self.folder / f"{self.container['name']}.log"

    def port(self, name: str) -> int:
        return next(p["containerPort"] for p in self.container["ports"] if p["name"] == name)

    def url(self, port: str, path: str = "") -> str:
        return f"http://{self.address}:{self.port(port)}{path}"

    def start(self) -> None:
        """Start it, or a new one in its place, after what has to run before."""
        if not self.files:
            self._mount()
        for init in self.spec.get("initContainers", ()):
            code = self._launch(init).wait(INIT_S)
            assert code == 0, f"{self.name}: {init['name']} ended with {code}\n{self.log}"
        self.process = self._launch(self.container)

    def _launch(self, container: dict) -> subprocess.Popen:
        own = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        own["PATH"] = f"{Path(ENTRYPOINT).parent}:{os.environ['PATH']}"
        environment = own | self.environment(container)
        named = container.get("command")
        command = [ENTRYPOINT] if named is None else [self._here(part) for part in named]
        command += [self._here(_expand(arg, environment)) for arg in container.get("args", ())]
        if self.release.hosts is not None:
            command = ["unshare", "-m", "sh", "-ec", self._mount_script(), *command]
        if self.network:
            command = ["ip", "netns", "exec", self.network, *command]
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def environment(self, container: dict) -> dict[str, str]:
        """As the kubelet makes it."""
        made = {}
        labels = self.template["metadata"]["labels"]
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                value = self.release.secret(reference["name"], reference["key"])
            elif "fieldRef" in source:
                fields = {"metadata.name": self.name, "status.podIP": self.address}
                fields |= {f"metadata.labels['{k}']": value for k, value in labels.items()}
                value = fields[source["fieldRef"]["fieldPath"]]
            elif "resourceFieldRef" in source:
                assert source["resourceFieldRef"]["resource"] == "limits.cpu"
                value = CPUS  # the tests' machine is small
            else:
                value = _expand(variable["value"], made)
            made[variable["name"]] = self._here(value)
        return made | {name: self._here(value) for name, value in self.injected.items()}

    def _mount(self) -> None:
        volumes = {v["name"]: v for v in self.spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            folder = self.folder / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            if self.release.hosts is not None:
                own = mount["mountPath"] in ("/tmp", "/dev/shm")
                folder = Path(mount["mountPath"]) if own else Path(MOUNTS) / mount["name"]
            self.files[mount["mountPath"]] = folder
        for mount in self.container["volumeMounts"]:
            volume, folder = volumes[mount["name"]], self.folder / mount["name"]
            if "configMap" in volume:
                data = self.release.render.named("ConfigMap", volume["configMap"]["name"])["data"]
                for name, content in data.items():
                    (folder / name).write_text(self._here(content))
            elif "secret" in volume:
                data = self.release.render.named("Secret", volume["secret"]["secretName"])["data"]
                for name, content in data.items():
                    (folder / name).write_bytes(base64.b64decode(content))

    def _mount_script(self) -> str:
        """Mounts of this container's own, then its command. What it runs from stays, wherever."""
        lines = [
            f"mount --bind {self.release.hosts} /etc/hosts",
            f"mount --bind {self.release.folder}/resolv.conf /etc/resolv.conf",
            f"mount -t tmpfs none {MOUNTS}",
        ]
        if self.spec["automountServiceAccountToken"]:
            account = self.release.accounts[self.spec["serviceAccountName"]]
            lines += ["mount -t tmpfs none /run", f"mkdir -p {ACCOUNT}"]
            lines += [f"mount --bind {account} {ACCOUNT}"]
        # /tmp last: the others' folders are below the real one
        for mount in sorted(self.container["volumeMounts"], key=lambda m: m["mountPath"] == "/tmp"):
            at = f"{MOUNTS}/{mount['name']}"
            lines += [f"mkdir {at}", f"mount --bind {self.folder / mount['name']} {at}"]
            if mount["mountPath"] == "/tmp":
                lines += self._own_tmp(at)
        return "\n".join([*lines, "cd /", 'exec "$0" "$@"'])

    @staticmethod
    def _own_tmp(volume: str) -> list[str]:
        real = f"{MOUNTS}/real"
        lines = [f"mkdir {real}", f"mount --bind /tmp {real}", f"mount --bind {volume} /tmp"]
        for path in {str(ROOT), sys.prefix}:
            if path.startswith("/tmp/"):
                there = path.replace("/tmp", real, 1)
                lines += [f"mkdir -p {path}", f"mount --bind {there} {path}"]
        return lines

    def _here(self, text: str) -> str:
        """Pods' names as addresses, every interface as this pod's, mount paths as folders."""
        text = self.release.resolve(text).replace("0.0.0.0", self.address)
        if not self.files:
            return text
        paths = "|".join(map(re.escape, self.files))
        return re.sub(
            rf"(?<![\w/.])({paths})(?![\w-])", lambda at: str(self.files[at.group(1)]), text
        )

    def probe(self, kind: str) -> bool:
        """One try of a probe, as the kubelet does it."""
        probe = self.container[kind]
        if "tcpSocket" in probe:
            address = (self.address, self.port(probe["tcpSocket"]["port"]))
            with socket.socket() as sock:
                return sock.connect_ex(address) == 0
        get = probe["httpGet"]
        try:
            with urllib.request.urlopen(
                self.url(get["port"], get["path"]), timeout=probe["timeoutSeconds"]
            ):
                return True
        except (urllib.error.HTTPError, OSError):
            return False

    def wait_for(self, kind: str) -> None:
        """Until the probe succeeds; not longer than a start may take. Raises AssertionError."""
        probe = self.container["startupProbe"]
        deadline = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        while not self.probe(kind):
            assert self.process.poll() is None, f"{self.name} ended:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name}: {kind} fails\n{self.log}"
            time.sleep(0.2)

    def terminate(self) -> int:
        """End it as the kubelet does; returns the exit code. Raises when it needs to be killed."""
        grace = self.spec["terminationGracePeriodSeconds"]
        began = time.monotonic()
        hook = self.container.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook:
            subprocess.run(hook["command"], check=True, timeout=grace)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(grace - (time.monotonic() - began))

    def clear(self) -> None:
        """Empty what lives as long as the pod: it is made anew, not its container started again."""
        for volume in self.spec["volumes"]:
            folder = self.folder / volume["name"]
            if "emptyDir" in volume and folder.exists():
                shutil.rmtree(folder)
                folder.mkdir()

    def kill(self) -> None:
        """End it and all it has started, in whatever session."""
        if self.process is not None and self.process.poll() is None:
            for pid in [self.process.pid, *_descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(10)


class LocalRelease:
    """All pods of a render, each a process. A context manager: at its end they are gone.

    With `names`, pods find each other by the names that DNS has in a cluster, from a hosts file
    that only they see. It takes root.
    """

    def __init__(self, render: Render, folder: Path, *, names: bool = False) -> None:
        self.render = render
        self.folder = folder
        self.hosts: Path | None = None
        self.subnet = f"127.{1 + os.getpid() % 250}.{next(_SUBNETS)}"
        self._used = 0
        self.pods: dict[str, LocalPod] = {}
        self.services: dict[str, str] = {}
        """Names in DNS that lead to an address, beside those of pods."""
        self.secrets: dict[tuple[str, str], str] = {}
        """Name and key -> content, of secrets that the values name as existing."""
        self.accounts: dict[str, Path] = {}
        """Name of a service account -> the folder with its token."""
        for workload in render.workloads:
            for number in range(workload["spec"]["replicas"]):
                self.add_replica(workload, number)
        if names:
            self.hosts = folder / "hosts"
            self.write_hosts()
            # nobody else knows a name: who asks is told so at once
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    def write_hosts(self) -> None:
        """What DNS knows now; running pods see it at once."""
        named = [(pod.address, name) for pod in self.pods.values() for name in _names(pod)]
        named += [(address, name) for name, address in self.services.items()]
        lines = [f"{address} {name} {name.removesuffix('.svc')}" for address, name in named]
        self.hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def add_replica(self, workload: dict, number: int) -> None:
        """One more of its pods, or groups; not started yet."""
        name, (template, *others) = workload["metadata"]["name"], pod_templates(workload)
        separator = "-x" if workload["kind"] == "Deployment" else "-"
        pod = f"{name}{separator}{number}"
        if not others:
            self.add(pod, template)
            return
        size = workload["spec"]["leaderWorkerTemplate"]["size"]
        for index in range(size):
            group = {
                "LWS_LEADER_ADDRESS": f"{pod}.{name}.{NAMESPACE}",
                "LWS_GROUP_SIZE": str(size),
                "LWS_WORKER_INDEX": str(index),
            }
            self.add(f"{pod}-{index}" if index else pod, others[0] if index else template, group)

    def add(
        self,
        name: str,
        template: dict,
        injected: dict[str, str] | None = None,
        place: tuple[str, str] | None = None,
    ) -> list[LocalPod]:
        """One more pod; its containers, of which the first has what is injected. `place` is an
        address and the network that it is in."""
        address, network = place or (f"{self.subnet}.{FIRST_ADDRESS + self._used}", "")
        self._used += place is None
        added = []
        for number, container in enumerate(template["spec"]["containers"]):
            key = f"{name}/{container['name']}" if number else name
            given = (injected or {}) if number == 0 else {}
            self.pods[key] = LocalPod(
                name, address, template, self.folder / name, self, number, given, network
            )
            added.append(self.pods[key])
        return added

    def of(self, role: str) -> list[LocalPod]:
        return [pod for pod in self.pods.values() if pod.role == role]

    def secret(self, name: str, key: str) -> str:
        if (name, key) in self.secrets:
            return self.secrets[name, key]
        return base64.b64decode(self.render.named("Secret", name)["data"][key]).decode()

    def resolve(self, text: str) -> str:
        """Names of pods and services as the cluster's DNS has them, as addresses."""
        for pod in self.pods.values():
            if self.hosts is None:
                text = text.replace(_names(pod)[0], pod.address)
                text = text.replace(_names(pod)[0].removesuffix(".svc"), pod.address)
        for service in self.render.of("Service"):
            name = f"//{service['metadata']['name']}.{NAMESPACE}.svc:"
            if name in text:
                (port,) = service["spec"]["ports"]
                pod = self.of(service["spec"]["selector"]["app.kubernetes.io/component"])[0]
                there = f"//{pod.address}:{pod.port(port['targetPort'])}"
                text = text.replace(f"{name}{port['port']}", there)
        return text

    def run_test_pod(self) -> subprocess.CompletedProcess[str]:
        """What `helm test` does."""
        (template,) = self.render.of("Pod")
        pod = LocalPod("test", "127.0.0.1", template, self.folder / "test", self)
        pod.start()
        code = pod.process.wait(120)
        return subprocess.CompletedProcess([], code, pod.log)

    def __enter__(self) -> LocalRelease:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods.values():
            pod.kill()


def _descendants(pid: int) -> list[int]:
    """Its children, and theirs."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, listed.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _names(pod: LocalPod) -> list[str]:
    """In DNS: its own, by its headless service, and that service's."""
    parts = 2 if int(pod.injected.get("LWS_WORKER_INDEX", 0)) else 1
    service = f"{pod.name.rsplit('-', parts)[0]}.{NAMESPACE}.svc"
    return [f"{pod.name}.{service}", service]


def _expand(arg: str, environment: dict[str, str]) -> str:
    """`$(NAME)`, as the kubelet does it."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found.group(1)], arg)
