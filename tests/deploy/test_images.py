"""What the images are built from. `pytest -m slow` builds one, where buildah can."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from importlib.metadata import packages_distributions, requires, version

import pytest
import yaml
from manifests import CHART, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IMPORTED = """
import importlib, json, sys
for name in ("quire.cli.gateway", "quire.cli.router", "quire.cli.http_server", "quire.gateway.app",
             "quire.gateway.http_protocol", "quire.router.server", "quire.cluster.status_server",
             "quire.text.tokenizer", "uvloop", "httptools", "huggingface_hub.errors"):
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
BUILD_S = 1800
ENDS = (" AS gateway", " AS cpu", " AS cuda", " AS coordinator")
"""What the lines of images that start from the base end in."""
PORT = 18077


def pinned(name: str) -> dict[str, str]:
    lines = (DOCKER / f"{name}-requirements.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): number for package, number in pairs}


def closure(names: set[str]) -> set[str]:
    """With what they require on this machine, extras left out."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needed = [Requirement(text) for text in requires(name) or ()]
            left += [
                canonicalize_name(each.name)
                for each in needed
                if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return found


def test_the_gateways_packages_are_what_it_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=60, check=True
    )
    by_module = packages_distributions()
    imported = {
        canonicalize_name(distribution)
        for module in json.loads(done.stdout)
        for distribution in set(by_module.get(module, ())) - {"quire"}
    }
    # of the namespace package grpc, and what only a debugger or pytest's plug-ins bring
    imported -= {"grpcio-tools", "setuptools", "sniffio"}
    listed = set(pinned("gateway"))
    assert imported <= listed
    assert "torch" not in listed
    extra = listed - closure(imported)
    # imported when a frame is checked, or a command line asks a server
    assert extra <= {"xxhash", "httpx2", "httpcore2", "certifi", "truststore", "h11"}


def test_a_workers_packages_are_what_the_distribution_requires() -> None:
    both = pinned("gateway") | pinned("worker")
    needed = closure({"quire"}) - {"quire", "torch"}
    missing = {n for n in needed if not n.startswith("nvidia") and n != "triton"} - set(both)
    assert not missing


def test_ray_is_complete_and_changes_no_other_package() -> None:
    assert closure({"ray"}) <= set(pinned("gateway") | pinned("ray"))
    assert not set(pinned("ray")) & set(pinned("worker"))
    for name, number in pinned("ray").items():
        assert pinned("gateway").get(name, number) == number
    bounds = [each for each in map(Requirement, requires("quire")) if each.name == "ray"]
    assert bounds
    assert all(pinned("ray")["ray"] in bound.specifier for bound in bounds)


IMPORTED_BY_THE_COORDINATOR = """
import sys
import quire.cli.up, quire.cli.node, quire.coordinator.server, quire.coordinator.node
import quire.cluster.status_server
print("torch" in sys.modules)
"""


def test_the_coordinator_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_BY_THE_COORDINATOR],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


def test_the_kubernetes_client_is_complete() -> None:
    assert closure({"kubernetes"}) <= set(pinned("gateway") | pinned("kubernetes"))


def test_ray_serve_is_complete_and_changes_no_other_package() -> None:
    both = pinned("gateway") | pinned("ray")
    assert not set(pinned("serve")) & set(both)
    optional = extras("ray", "default", "serve")
    assert {canonicalize_name(each.name) for each in optional} <= set(both | pinned("serve"))
    for each in optional:
        assert (both | pinned("serve"))[canonicalize_name(each.name)] in each.specifier, each


def extras(package: str, *names: str) -> list[Requirement]:
    """What its extras require by themselves."""
    found = [Requirement(text) for text in requires(package) or ()]
    return [r for r in found if r.marker and any(r.marker.evaluate({"extra": n}) for n in names)]


def test_versions_fit_the_distributions_own_bounds() -> None:
    both = pinned("gateway") | pinned("worker") | {"torch": "2.13.0"}
    for text in requires("quire"):
        each = Requirement(text)
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            assert both[canonicalize_name(each.name)] in each.specifier, text


def test_targets_and_users_are_what_the_chart_expects() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M))
    values = (CHART / "values.yaml").read_text()
    flavours = yaml.safe_load(values)["image"]["flavours"]
    with_ray = {f"{flavours[accelerator]}-ray" for accelerator in ("cpu", "nvidia")}
    assert set(flavours.values()) | with_ray | {f"{flavours['coordinator']}-serve"} <= targets
    assert "runAsUser: 10001" in values
    final = DOCKERFILE.split("\nFROM ")
    for stage in final:
        if stage.partition("\n")[0].endswith(ENDS):
            assert "USER 10001:10001" in stage
            assert 'ENTRYPOINT ["quire"]' in stage
    assert re.search(r"^ARG BASE=\S+:\S+-\d{8}-\S+$", DOCKERFILE, re.M), "the base is pinned"
    assert f"torch=={version('torch').partition('+')[0]}" in DOCKERFILE


def buildah(*args: str, timeout: float = 60) -> str:
    done = subprocess.run(
        ["buildah", *args], env=os.environ | {"STORAGE_DRIVER": "vfs"}, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture
def container(request):
    """A container of a freshly built image: its root, not its isolation, is what is tested."""
    if shutil.which("buildah") is None or shutil.which("debootstrap") is None:
        pytest.skip("buildah and debootstrap are not installed")
    wheels = [folder for folder in [os.environ.get("PIP_FIND_LINKS", "")] if folder]
    done = subprocess.run(
        [str(DOCKER / "build-offline"), request.param, *wheels],
        capture_output=True, text=True, timeout=BUILD_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    name = buildah("from", "--pull-never", f"localhost/quire:0.1.0-{request.param}", timeout=300)
    yield name
    buildah("rm", name, timeout=300)


def inside(container: str, *command: str) -> list[str]:
    return ["buildah", "run", "--isolation", "chroot", container, "--", *command]


@pytest.mark.slow
@pytest.mark.timeout(2 * BUILD_S)
@pytest.mark.parametrize("container", ["gateway"], indirect=True)
def test_the_gateways_image_has_its_commands_and_no_torch(container) -> None:
    for command in ("gateway", "router"):
        assert "usage" in buildah(*inside(container, "quire", command, "--help")[1:])
    listed = buildah(
        *inside(container, "sh", "-c", "ls /opt/quire/lib/python3*/site-packages; id -u")[1:]
    )
    assert listed.endswith("10001")
    assert "starlette" in listed
    assert "torch" not in listed.split()


@pytest.mark.slow
@pytest.mark.timeout(2 * BUILD_S)
@pytest.mark.parametrize("container", ["cpu"], indirect=True)
def test_the_cpu_image_serves_the_demo_model(container) -> None:
    command = ["quire", "serve", "--port", str(PORT), "--kv-cache-memory-bytes", "64M"]
    server = subprocess.Popen(
        inside(container, *command), env=os.environ | {"STORAGE_DRIVER": "vfs"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for line in server.stdout:
            if "is ready at" in line:
                break
        else:
            pytest.fail("the server ended")
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/completions",
            b'{"model": "demo", "prompt": "def main(", "max_tokens": 8}',
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["finish_reason"] == "length"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)
