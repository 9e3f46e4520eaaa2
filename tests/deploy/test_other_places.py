"""Manifests for KubeRay without Helm, and examples for serverless platforms."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from types import ModuleType

import jsonschema
import pytest
import yaml
from local_pods import ENTRYPOINT
from manifests import CHART, CUSTOM, ROOT, helm, pod_templates, tool

from quire.config.engine import EngineConfig

RAY = ROOT / "deploy" / "ray"
SERVERLESS = ROOT / "deploy" / "serverless"
TEXTS = {"type": "array", "items": {"type": "string"}}
RUNPOD_TEMPLATE = {
    "type": "object",
    "required": ["name", "imageName"],
    "additionalProperties": False,
    "properties": {
        **{key: {"type": "string"} for key in ("name", "imageName", "readme", "volumeMountPath")},
        **dict.fromkeys(("dockerEntrypoint", "dockerStartCmd"), TEXTS),
        **{key: {"type": "boolean"} for key in ("isPublic", "isServerless")},
        **{key: {"type": "integer", "minimum": 0} for key in ("containerDiskInGb", "volumeInGb")},
        "category": {"enum": ["NVIDIA", "AMD", "CPU"]},
        "containerRegistryAuthId": {"type": "string"},
        "env": {"type": "object", "additionalProperties": {"type": "string"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^\d+/(http|tcp)$"}},
    },
}
"""Body of a POST to /templates of RunPod's REST API, v1."""


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_a_ray_manifest_is_what_the_chart_makes(kind) -> None:
    done = helm(
        "template", "quire", str(CHART), "--namespace", "default", "-f", str(RAY / "values.yaml"),
        "--set", f"ray.kuberay.kind={kind}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (RAY / f"{kind.lower()}.yaml").read_text()
    assert text == done.stdout, "render it again: deploy/ray/README.md"


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_a_ray_manifest_is_valid_and_needs_only_the_secrets_that_are_made(kind) -> None:
    text = (RAY / f"{kind.lower()}.yaml").read_text()
    objects = [each for each in yaml.safe_load_all(text) if each]
    (cluster,) = [each for each in objects if each["kind"] == kind]
    jsonschema.validate(cluster, CUSTOM[kind])
    assert [each["metadata"]["labels"]["app.kubernetes.io/component"]
            for each in pod_templates(cluster)] == ["coordinator", "decode", "prefill"]  # fmt: skip
    made = re.findall(
        r"create secret generic (\S+) --from-literal=(\S+?)=", (RAY / "README.md").read_text()
    )
    named = re.findall(r"secretKeyRef:\s+name: (\S+)\s+key: (\S+)", text)
    assert set(named) == set(made)
    assert not [each for each in objects if each["kind"] == "Secret"]


def understood(command: list[str]) -> str:
    """What `quire` makes of a command line. Raises AssertionError when it refuses it."""
    done = subprocess.run(
        [ENTRYPOINT, *command[1:], "--dump-config"], capture_output=True, text=True,
        env=os.environ | {"QUIRE_API_KEY": "key"}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class FakeModal(ModuleType):
    """Notes how it is used; everything returns something that can be called and asked further."""

    def __init__(self) -> None:
        super().__init__("modal")
        self.calls: dict[str, dict] = {}

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(self.calls, name)


class Recorder:
    def __init__(self, calls: dict[str, dict], path: str) -> None:
        self._calls, self._path = calls, path

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(self._calls, f"{self._path}.{name}")

    def __call__(self, *args: object, **options: object) -> object:
        if len(args) == 1 and callable(args[0]) and not isinstance(args[0], Recorder):
            return args[0]  # what a decorator was made for
        self._calls[self._path] = options
        return self


def test_the_modal_example_starts_a_server_that_quire_understands(monkeypatch) -> None:
    modal = FakeModal()
    monkeypatch.setitem(sys.modules, "modal", modal)
    made = runpy.run_path(str(SERVERLESS / "modal_app.py"))
    dumped = yaml.safe_load(understood(made["COMMAND"]))
    assert modal.calls["web_server"]["port"] == dumped["port"]
    taken = dumped.get("max_num_seqs", EngineConfig().max_num_seqs)
    assert modal.calls["concurrent"]["max_inputs"] == taken
    assert made["serve"].__name__ == "serve"


def test_the_runpod_template_is_what_its_api_takes_and_quire_understands() -> None:
    template = json.loads((SERVERLESS / "runpod_template.json").read_text())
    jsonschema.validate(template, RUNPOD_TEMPLATE)
    (entrypoint,) = set(
        re.findall(r"^ENTRYPOINT (.+)$", (ROOT / "deploy/docker/Dockerfile").read_text(), re.M)
    )
    assert template["dockerEntrypoint"] == json.loads(entrypoint)
    dumped = yaml.safe_load(understood(["quire", *template["dockerStartCmd"]]))
    port = str(dumped["port"])
    assert dumped["host"] == "0.0.0.0"
    assert template["ports"] == [f"{port}/http"]
    assert (template["env"]["PORT"], template["env"]["PORT_HEALTH"]) == (port, port)
    assert template["imageName"].endswith("-cuda")


def test_the_values_of_cloud_nodes_are_the_charts() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (SERVERLESS / "README.md").read_text(), re.S)
    done = subprocess.run(
        [tool("helm"), "template", "q", str(CHART), "-f", "-"], input=block, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gke-accelerator: nvidia-l4" in done.stdout
