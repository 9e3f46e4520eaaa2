"""Renders of the chart, and the tools that check them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "quire"
EXAMPLES = sorted((ROOT / "helm" / "examples").glob("*.yaml"))
EVERYTHING = ROOT / "tests" / "deploy" / "everything.yaml"
SCHEMAS = ROOT / "tests" / "deploy" / "schemas"
CUSTOM = {path.stem: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
"""Kinds that are no part of Kubernetes, by the schemas kept there."""
NAMESPACE = "models"
RELEASE = "q"
GROUPS = "leaderworkerset.x-k8s.io/v1"
"""An API that the cluster of all renders has."""
TIMEOUT_S = 60


def tool(name: str) -> str:
    """Path of a program; the test is skipped without it, except in CI, which installs them all."""
    found = shutil.which(name)
    if found is None:
        assert "DEPLOY_TOOLS" not in os.environ, f"{name} is not installed"
        pytest.skip(f"{name} is not installed; .ci/tools does")
    return found


def helm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("helm"), *args], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@dataclass(frozen=True)
class Render:
    """What a set of values becomes."""

    text: str

    @cached_property
    def objects(self) -> list[dict]:
        return [each for each in yaml.safe_load_all(self.text) if each]

    def of(self, *kinds: str) -> list[dict]:
        return [each for each in self.objects if each["kind"] in kinds]

    def named(self, kind: str, name: str) -> dict | None:
        return next((o for o in self.of(kind) if o["metadata"]["name"] == name), None)

    @property
    def workloads(self) -> list[dict]:
        """Objects that keep a number of replicas, each of one pod or of a group."""
        return self.of("Deployment", "StatefulSet", "LeaderWorkerSet")

    @property
    def pods(self) -> list[tuple[str, dict]]:
        """(name, pod template) of every pod there is, the test's too."""
        templates = [(w["metadata"]["name"], t) for w in self.workloads for t in pod_templates(w)]
        for cluster in self.of("RayCluster", "RayService"):
            groups = [group["groupName"] for group in ray_cluster(cluster)["workerGroupSpecs"]]
            names = [f"{cluster['metadata']['name']}-{each}" for each in ("coordinator", *groups)]
            templates += zip(names, pod_templates(cluster), strict=True)
        return templates + [(p["metadata"]["name"], p) for p in self.of("Pod")]


def ray_cluster(each: dict) -> dict:
    """The specification of the RayCluster that there is, or that KubeRay makes."""
    return each["spec"].get("rayClusterConfig", each["spec"])


def pod_templates(each: dict) -> list[dict]:
    """The pods of an object that makes some, of a group the leader's first."""
    spec = each["spec"]
    if each["kind"] in ("RayCluster", "RayService"):
        spec = ray_cluster(each)
        return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    if each["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [spec["template"]] if each["kind"] in ("Deployment", "StatefulSet") else []


_renders: dict[tuple, Render] = {}


def render(*files: Path, sets: tuple[str, ...] = (), kube: str = "1.33.0") -> Render:
    """Raises AssertionError with what helm says."""
    key = (files, sets, kube)
    if key not in _renders:
        args = [arg for file in files for arg in ("-f", str(file))]
        args += [arg for each in sets for arg in ("--set", each)]
        done = helm(
            "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", kube,
            "--api-versions", GROUPS, *args,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        _renders[key] = Render(done.stdout)
    return _renders[key]


VALUE_SETS: dict[str, tuple[Path, ...]] = {
    "default": (),
    **{path.stem: (path,) for path in EXAMPLES},
    "everything": (EVERYTHING,),
}
