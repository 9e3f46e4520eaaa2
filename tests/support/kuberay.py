"""KubeRay's part in a RayService, on local pods: it makes clusters, sends their dashboards the
application and asks how that is, and moves the head's Service.

Paths and the header are those of its sources (1.6). A pod has a network of its own,
because Ray's head listens at every address there is.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from manifests import NAMESPACE, ray_cluster
from ray_cluster_pods import OWNER, head_service, pods_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from local_pods import LocalPod, LocalRelease
    from network import Host

APPLICATIONS = "/api/serve/applications/"
SECRET_KEY = "auth_token"


@dataclass
class LocalRayCluster:
    """The pods of one cluster."""

    head: list[LocalPod]
    """Its containers."""
    workers: list[LocalPod]
    service: dict
    token: str

    @property
    def pods(self) -> list[LocalPod]:
        return [*self.head, *self.workers]

    def start(self) -> None:
        for pod in self.pods:
            pod.start()

    @property
    def is_up(self) -> bool:
        """The head's dashboard can be called."""
        with socket.socket() as sock:
            return sock.connect_ex((self.head[0].address, self.head[0].port("dashboard"))) == 0

    def submit(self, token: str | None = None) -> int:
        """PUT the application; returns the status code."""
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        return self._call("PUT", APPLICATIONS, json.dumps(config).encode(), token)[0]

    def application(self) -> dict:
        """The only one. Empty while there is none."""
        _, body = self._call("GET", f"{APPLICATIONS}?api_type=declarative", None, self.token)
        applications = json.loads(body)["applications"]
        assert len(applications) <= 1
        return next(iter(applications.values()), {})

    def _call(self, method: str, path: str, body: bytes | None, token: str | None):
        request = urllib.request.Request(self.head[0].url("dashboard", path), body, method=method)
        request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("x-ray-authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


class KubeRay:
    """For the RayService of a release whose pods have names; each takes one of the hosts."""

    def __init__(self, release: LocalRelease, hosts: Iterable[Host]) -> None:
        self._release = release
        self._places = ((host.address, host.namespace) for host in hosts)
        (self.service,) = release.render.of("RayService")

    def make_cluster(self, suffix: str) -> LocalRayCluster:
        """A cluster as the RayService has it now, with a name of its own; not started."""
        metadata, spec = self.service["metadata"], ray_cluster(self.service)
        name = f"{metadata['name']}-{suffix}"
        labels = metadata["labels"] | {OWNER: "RayService"}
        cluster = {"metadata": metadata | {"name": name, "labels": labels}, "spec": spec}
        head, *workers = [
            self._release.add(pod, template, place=next(self._places))
            for pod, template in pods_of(cluster)
        ]
        domain = f"{head_service(cluster)}.{NAMESPACE}.svc.cluster.local"
        self._release.services[domain] = head[0].address
        self._release.write_hosts()
        token = self._release.secret(spec["authOptions"]["secretName"], SECRET_KEY)
        return LocalRayCluster(head, [pod for pods in workers for pod in pods], self.service, token)

    def lead_to(self, cluster: LocalRayCluster) -> None:
        """Its head is behind the RayService's name from now on."""
        name = f"{head_service(self.service)}.{NAMESPACE}.svc"
        self._release.services[name] = cluster.head[0].address
        self._release.write_hosts()
