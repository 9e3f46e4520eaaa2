"""Compose files: their structure, and the services of the CPU one as local processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request

import jsonschema
import pytest
import yaml
from local_pods import ENTRYPOINT
from manifests import ROOT, SCHEMAS
from prometheus import Prometheus

FOLDER = ROOT / "deploy" / "compose"
FILES = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "prometheus"]
SECRETS = {"QUIRE_CLUSTER_TOKEN": "token-of-a-test", "QUIRE_API_KEY": "key-of-a-test"}
GIVEN = SECRETS | {"MODEL": "demo", "GPUS": "2"}
VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
START_S = 120
SPECIFICATION = jsonschema.Draft7Validator(
    json.loads((SCHEMAS / "compose" / "compose-spec.json").read_text())
)
"""The Compose Specification's own schema."""
GRAFANA = ROOT / "grafana"


def interpolate(text: str, environment: dict[str, str]) -> str:
    """As compose does it; a variable that must be given and is not is an error."""

    def value(found: re.Match) -> str:
        name, kind, rest = found.groups()
        assert name in environment or kind == "-", f"{name} is not set: {rest}"
        return environment.get(name, rest or "")

    return VARIABLE.sub(value, text)


def load(name: str, environment: dict[str, str] = GIVEN) -> dict:
    return yaml.safe_load(interpolate((FOLDER / f"{name}.yaml").read_text(), environment))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_file_is_valid_and_complete(path) -> None:
    content = load(path.stem)
    SPECIFICATION.validate(content)
    for service in content["services"].values():
        if "extends" in service:
            base = load(service["extends"]["file"].removesuffix(".yaml"))
            service = base["services"][service["extends"]["service"]] | service
        name, _, tag = service["image"].rpartition(":")
        assert name, service["image"]
        assert tag != "latest"
        assert set(service.get("depends_on", ())) <= set(content["services"])
        assert set(service.get("secrets", ())) <= set(content.get("secrets", ()))
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                assert source in content["volumes"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "open to the network"
        if service["image"].startswith("quire:"):
            assert service["user"] == "10001:10001"
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize(
    ("service", "broken"),
    [
        ("decode", {"healtcheck": {}}),
        ("decode", {"healthcheck": {"test": ["CMD", "true"], "intervall": "5s"}}),
        ("decode", {"healthcheck": {"test": ["CMD", "true"], "retries": {}}}),
        ("decode", {"environment": {"QUIRE_API_KEY": {"from": "file"}}}),
        ("decode", {"deploy": {"resources": {"reservations": {"gpus": 1}}}}),
        ("grafana", {"depends_on": {"prometheus": {"condition": "ready"}}}),
    ],
)
def test_what_compose_would_refuse_is_refused_here(service, broken) -> None:
    """The check above sees what it is for."""
    content = load("cpu")
    content["services"][service] |= broken
    with pytest.raises(jsonschema.ValidationError):
        SPECIFICATION.validate(content)


def test_grafana_is_provisioned_with_what_it_finds_there() -> None:
    """Its files name each other, the other services, and paths in its container."""
    services = load("cpu")["services"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in services["grafana"]["volumes"])
    provisioning = (FOLDER / mounts["/etc/grafana/provisioning"]).resolve()
    assert {path.name for path in provisioning.iterdir()} == {"dashboards", "datasources"}
    (sources,) = (provisioning / "datasources").glob("*.yaml")
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    assert set(source) <= {"name", "type", "access", "url", "isDefault", "jsonData"}
    assert (source["type"], source["access"], source["isDefault"]) == ("prometheus", "proxy", True)
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in services
    assert port == "9090", "Prometheus listens there unless told otherwise"
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"] == {"timeInterval": scraped}, "or rates are over too few samples"
    (providers,) = (provisioning / "dashboards").glob("*.yaml")
    content = yaml.safe_load(providers.read_text())
    (provider,) = content["providers"]
    assert content["apiVersion"] == yaml.safe_load(sources.read_text())["apiVersion"] == 1
    assert set(provider) <= {"name", "folder", "type", "options"}
    assert provider["type"] == "file"
    boards = (FOLDER / mounts[provider["options"]["path"]]).resolve()
    assert boards == GRAFANA / "dashboards"
    assert len({json.loads(path.read_text())["uid"] for path in boards.glob("*.json")}) == 5


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_what_must_be_given_is_asked_for(path) -> None:
    needed = {name for name, kind, _ in VARIABLE.findall(path.read_text()) if kind == "?"}
    assert needed
    for name in needed:
        with pytest.raises(AssertionError, match=f"{name} is not set: ."):
            load(path.stem, {k: v for k, v in GIVEN.items() if k != name})


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_commands_are_understood(path) -> None:
    """By the commands themselves, which then show what they understood."""
    for service in load(path.stem)["services"].values():
        if service.get("image", "quire:").startswith("quire:"):
            done = subprocess.run(
                [ENTRYPOINT, *service["command"], "--dump-config"], env=os.environ | SECRETS,
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


class Composed:
    """Services of our images as processes, each on an address of its own."""

    def __init__(self, services: dict, folder) -> None:
        ours = [n for n, s in services.items() if s["image"].startswith("quire:")]
        self.addresses = {name: f"127.0.78.{16 + n}" for n, name in enumerate(ours)}
        self.services = services
        self._folder = folder
        self._processes: dict[str, subprocess.Popen] = {}

    def here(self, text: str, own: str = "") -> str:
        for name, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.-]){name}:(?=\d)", f"{address}:", text)
        return text.replace("0.0.0.0", own)

    def __enter__(self) -> Composed:
        for name, address in self.addresses.items():
            service = self.services[name]
            environment = {"PATH": os.environ["PATH"], "HOME": str(self._folder)}
            with (self._folder / name).open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    [ENTRYPOINT, *(self.here(arg, address) for arg in service["command"])],
                    env=environment | service["environment"], stdout=log,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(10)

    def wait(self) -> None:
        """Until every service's own health check passes."""
        deadline = time.monotonic() + START_S
        for name, address in self.addresses.items():
            kind, *command = self.services[name]["healthcheck"]["test"]
            assert kind == "CMD"
            command = [part.replace("127.0.0.1", address) for part in command]
            command[0] = sys.executable
            while subprocess.run(command, capture_output=True, timeout=30, check=False).returncode:
                assert self._processes[name].poll() is None, (self._folder / name).read_text()
                assert time.monotonic() < deadline, f"{name}: {shlex.join(command)}"
                time.sleep(0.3)


def test_the_cpu_files_services_serve_and_its_prometheus_sees_them(tmp_path) -> None:
    services = load("cpu")["services"]
    with Composed(services, tmp_path) as composed:
        composed.wait()
        request = urllib.request.Request(
            f"http://{composed.addresses['gateway']}:8000/v1/completions",
            b'{"model": "demo", "prompt": "def main(", "max_tokens": 8}',
            {"Authorization": "Bearer key-of-a-test", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert b'"finish_reason":"length"' in answer.read().replace(b" ", b"")
        config = composed.here((FOLDER / "prometheus.yaml").read_text())
        for secret, variable in (
            ("cluster-token", "QUIRE_CLUSTER_TOKEN"),
            ("api-key", "QUIRE_API_KEY"),
        ):
            (tmp_path / secret).write_text(SECRETS[variable])
            config = config.replace(f"/run/secrets/{secret}", str(tmp_path / secret))
        jobs = yaml.safe_load(config)["scrape_configs"]
        with Prometheus(jobs, tmp_path) as prometheus:
            deadline = time.monotonic() + 30
            while set(prometheus.targets().values()) != {"up"}:
                assert time.monotonic() < deadline, prometheus.targets()
                time.sleep(0.5)
            roles = {each["metric"]["role"] for each in prometheus.query("up")}
        assert roles == {"prefill", "decode", "router", "gateway"}
