"""The API server, as far as gateways and routers ask it, over the pods of a local release.

It knows accounts by their tokens, allows what the render's Roles allow, has an EndpointSlice for
each Service, and keeps what pods are told. Beside it, what controllers and kubelets make of that.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from typing import TYPE_CHECKING

from aiohttp import web
from certificates import certificate_files
from manifests import NAMESPACE

from quire.router.deletion_cost import ANNOTATION

if TYPE_CHECKING:
    from pathlib import Path

    from local_pods import LocalPod, LocalRelease

SERVICE = "kubernetes.io/service-name"
PORT = 6443


class FakeKubernetes:
    """A context manager. Pods of the release find it in their environment, as in a cluster."""

    def __init__(self, release: LocalRelease, folder: Path) -> None:
        self._release, self._folder = release, folder
        self.annotations: dict[str, dict[str, str]] = {}
        self.conditions: dict[str, dict[str, str]] = {}
        """Pod -> type -> status."""
        self.refused: list[str] = []
        self._watches: list[tuple[set[str], asyncio.Queue[bytes | None]]] = []
        self._accounts: dict[str, str] = {}
        """Token -> name."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._address = f"{release.subnet}.8"
        self._tls = certificate_files(folder, "kubernetes", self._address)
        for account in release.render.of("ServiceAccount"):
            self._make_account(account["metadata"]["name"])
        for pod in release.pods.values():
            self.adopt(pod)

    def _make_account(self, name: str) -> None:
        folder = self._folder / "accounts" / name
        folder.mkdir(parents=True)
        token = f"token-of-{name}"
        authority = (self._folder / "kubernetes-ca.pem").read_text()
        for file, text in (("token", token), ("ca.crt", authority), ("namespace", NAMESPACE)):
            (folder / file).write_text(text)
        self._accounts[token] = name
        self._release.accounts[name] = folder

    def adopt(self, pod: LocalPod) -> None:
        """A new pod: it has no conditions yet, and finds this server."""
        self.annotations[pod.name], self.conditions[pod.name] = {}, {}
        pod.injected |= {
            "KUBERNETES_SERVICE_HOST": self._address,
            "KUBERNETES_SERVICE_PORT": str(PORT),
        }

    def __enter__(self) -> FakeKubernetes:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self._release.pods.values():
            pod.kill()  # or it would hang up on them
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        slices = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        app.router.add_get(slices, self._slices)
        pods = "/api/v1/namespaces/{namespace}/pods/{name}"
        app.router.add_patch(pods, self._patch)
        app.router.add_patch(f"{pods}/status", self._patch_status)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self._tls["cluster_tls_cert"], self._tls["cluster_tls_key"])
        await web.TCPSite(self._runner, self._address, PORT, ssl_context=tls).start()

    async def _end(self) -> None:
        for _, queue in self._watches:
            queue.put_nowait(None)
        await self._runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    # ---- the API

    async def _slices(self, request: web.Request) -> web.StreamResponse:
        is_watch = "watch" in request.query
        self._allow(request, "watch" if is_watch else "list", "endpointslices", "discovery.k8s.io")
        label, _, among = request.query["labelSelector"].partition(" in ")
        assert label == SERVICE
        services = set(among.strip("()").split(","))
        if not is_watch:
            items = [self._slice(service) for service in sorted(services)]
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": items})
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._watches.append((services, queue))
        response = web.StreamResponse()
        await response.prepare(request)
        while (line := await queue.get()) is not None:
            await response.write(line)
        return response

    async def _patch(self, request: web.Request) -> web.Response:
        self._allow(request, "patch", "pods", "")
        body = await request.json()
        assert set(body) == {"metadata"}
        self._known(request, self.annotations).update(body["metadata"]["annotations"])
        return web.json_response(body)

    async def _patch_status(self, request: web.Request) -> web.Response:
        self._allow(request, "patch", "pods/status", "")
        body = await request.json()
        assert set(body) == {"status"}
        told = {each["type"]: each["status"] for each in body["status"]["conditions"]}
        self._known(request, self.conditions).update(told)
        return web.json_response(body)

    def _known(self, request: web.Request, pods: dict[str, dict[str, str]]) -> dict[str, str]:
        if request.match_info["name"] not in pods:
            raise web.HTTPNotFound
        return pods[request.match_info["name"]]

    def _allow(self, request: web.Request, verb: str, resource: str, group: str) -> None:
        """Who asks may do so by a Role that is bound to it; otherwise 401 or 403."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        account = self._accounts.get(token)
        if account is None or kind.lower() != "bearer":
            raise web.HTTPUnauthorized
        render = self._release.render
        bound = [
            render.named("Role", binding["roleRef"]["name"])
            for binding in render.of("RoleBinding")
            if account in [subject["name"] for subject in binding["subjects"]]
        ]
        asked = {"verbs": verb, "resources": resource, "apiGroups": group}
        rules = [rule for role in bound for rule in role["rules"]]
        allowed = any(all(asked[key] in rule[key] for key in asked) for rule in rules)
        if not allowed or request.match_info["namespace"] != NAMESPACE:
            self.refused.append(f"{account}: {verb} {resource}")
            raise web.HTTPForbidden

    # ---- controllers

    def _slice(self, name: str) -> dict:
        """What the controller of EndpointSlices makes of a Service and its pods."""
        service = self._release.render.named("Service", name)
        wanted = service["spec"]["selector"].items()
        pods = [
            pod
            for pod in self._release.pods.values()
            if wanted <= pod.template["metadata"]["labels"].items()
            and pod.name in self.annotations
            and pod.process is not None
        ]
        ports = [
            {"name": port["name"], "port": pods[0].port(port["targetPort"])}
            for port in service["spec"]["ports"]
            if pods
        ]
        return {
            "metadata": {"name": f"{name}-abcde", "labels": {SERVICE: name}},
            "endpoints": [self._endpoint(pod, name) for pod in pods],
            "ports": ports,
        }

    def _endpoint(self, pod: LocalPod, service: str) -> dict:
        found: dict = {
            "addresses": [pod.address],
            "targetRef": {"kind": "Pod", "name": pod.name},
            "conditions": {"ready": self.is_ready(pod)},
        }
        sets = self._release.render.of("StatefulSet")
        if service in [each["spec"]["serviceName"] for each in sets]:
            found["hostname"] = pod.name
        return found

    def is_ready(self, pod: LocalPod) -> bool:
        """Its probe, and its readiness gates."""
        told = self.conditions.get(pod.name, {})
        gates = [gate["conditionType"] for gate in pod.spec.get("readinessGates", ())]
        return all(told.get(gate) == "True" for gate in gates) and pod.probe("readinessProbe")

    def publish(self) -> None:
        """Tell watches how all Services are now."""
        self._loop.call_soon_threadsafe(self._publish)

    def _publish(self) -> None:
        for services, queue in self._watches:
            for service in services:
                event = {"type": "MODIFIED", "object": self._slice(service)}
                queue.put_nowait(json.dumps(event).encode() + b"\n")

    def start(self, pod: LocalPod) -> None:
        """A new pod, by this name for the first time or again."""
        self.adopt(pod)
        pod.start()
        self.publish()

    def delete(self, pod: LocalPod) -> int:
        """End it as its owner would have it ended; returns the exit code."""
        code = pod.terminate()
        del self.annotations[pod.name], self.conditions[pod.name]
        self.publish()
        return code

    def next_to_go(self, role: str) -> LocalPod:
        """The ready pod that a ReplicaSet would delete when it has one too many."""
        costs = {pod.name: self.cost(pod) for pod in self._release.of(role)}
        return min(self._release.of(role), key=lambda pod: costs[pod.name])

    def cost(self, pod: LocalPod) -> int:
        return int(self.annotations[pod.name].get(ANNOTATION, "0"))
