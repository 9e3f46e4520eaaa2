"""A Prometheus of this machine, scraping what monitors of a render find."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING

import yaml
from manifests import NAMESPACE, ROOT, tool

if TYPE_CHECKING:
    from pathlib import Path

    from local_pods import LocalRelease

ADDRESS = "127.0.77.9:9099"
INTERVAL = "1s"
START_S = 30


def scrape_configs(release: LocalRelease) -> list[dict]:
    """PodMonitors as the operator would write them, on addresses instead of discovery."""
    jobs = []
    for monitor in release.render.of("PodMonitor"):
        selector = monitor["spec"]["selector"]
        for number, endpoint in enumerate(monitor["spec"]["podMetricsEndpoints"]):
            credentials = endpoint["authorization"]["credentials"]
            token = release.secret(credentials["name"], credentials["key"])
            jobs.append(
                {
                    "job_name": f"{NAMESPACE}/{monitor['metadata']['name']}/{number}",
                    "metrics_path": endpoint["path"],
                    "scrape_interval": INTERVAL,
                    "authorization": {"credentials": token},
                    "static_configs": [
                        _target(pod, endpoint["port"])
                        for pod in release.pods.values()
                        if _matches(selector, pod.template["metadata"]["labels"])
                    ],
                    "relabel_configs": [
                        {"source_labels": r["sourceLabels"], "target_label": r["targetLabel"]}
                        for r in endpoint["relabelings"]
                    ],
                }
            )
    return jobs


def _target(pod, port: str) -> dict:
    labels = {
        "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", key): value
        for key, value in pod.template["metadata"]["labels"].items()
    }
    labels |= {"namespace": NAMESPACE, "pod": pod.name}
    return {"targets": [f"{pod.address}:{pod.port(port)}"], "labels": labels}


def _matches(selector: dict, labels: dict) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    among = selector.get("matchExpressions", ())
    return wanted and all(labels.get(e["key"]) in e["values"] for e in among)


class Prometheus:
    """The process. A context manager."""

    loaded_until = 0.0
    """When the load ended that it watched."""

    def __init__(self, jobs: list[dict], folder: Path) -> None:
        self._folder = folder
        config = {
            "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": [str(ROOT / "grafana" / "alerts.yaml")],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Prometheus:
        self._process = subprocess.Popen(
            [
                tool("prometheus"), f"--config.file={self._folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={ADDRESS}", "--log.level=warn",
            ]
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.get("/api/v1/status/buildinfo")
                return self
            except OSError:
                assert self._process.poll() is None, "Prometheus ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def get(self, path: str, **parameters: str) -> dict:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{ADDRESS}{path}?{query}", timeout=20) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict]:
        """Samples now, those that are no numbers left out. Raises OSError on a bad expression."""
        found = self.get("/api/v1/query", query=expression)["result"]
        return [sample for sample in found if sample["value"][1] not in ("NaN", "+Inf")]

    def range(self, expression: str, start: float, end: float, step: float) -> list[dict]:
        """Series over time."""
        times = {"start": str(start), "end": str(end), "step": str(step)}
        return self.get("/api/v1/query_range", query=expression, **times)["result"]

    def targets(self) -> dict[str, str]:
        """Address -> health."""
        active = self.get("/api/v1/targets")["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in active}
