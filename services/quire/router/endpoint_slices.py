"""Pods behind Services of Kubernetes, by their EndpointSlices.

    list -> all pods -> watch from there -> each change
    the watch ends (after RESYNC_S at the latest), breaks, or its version is too old: list again
    no answer: those that were there last stay; back off

Pods that are starting or ending are among them: they say themselves what they are ready for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    Connect = Callable[[], AbstractAsyncContextManager[Any]]

logger = logging.getLogger(__name__)

RESYNC_S = 120
REQUEST_S = 10.0
SILENCE_S = 10.0
"""A watch that has not ended this long after RESYNC_S never will."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 10.0
MAX_EVENT_BYTES = 4 << 20
SERVICE_LABEL = "kubernetes.io/service-name"
PORT_NAME = "grpc"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
FORBIDDEN = 403


class _Again(Exception):
    """The list is to be asked for again; the message says why."""


@asynccontextmanager
async def in_cluster() -> AsyncIterator[Any]:
    """The API of EndpointSlices for a pod's own account. Raises OSError outside of a cluster."""
    from kubernetes.aio import client

    async with api_client() as api:
        yield client.DiscoveryV1Api(api)


@asynccontextmanager
async def api_client() -> AsyncIterator[Any]:
    """Kubernetes' client of a pod's own account. Raises OSError outside of a cluster."""
    from kubernetes.aio import client, config

    settings = client.Configuration()
    load: Any = config.load_incluster_config
    try:
        load(client_configuration=settings)
    except config.ConfigException as error:
        raise OSError(f"not in a pod of Kubernetes: {error}") from None
    async with client.ApiClient(settings) as api:
        yield api


def own_namespace() -> str:
    """Namespace of this pod. Raises OSError outside of one, or without the API's client."""
    if find_spec("kubernetes") is None:
        raise OSError("the Kubernetes client is not installed: pip install 'quire[kubernetes]'")
    try:
        return NAMESPACE_FILE.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise OSError(f"not in a pod of Kubernetes: {NAMESPACE_FILE} is missing") from None


class EndpointSlices:
    """Implements `Discovery`, with the pods in `beside` always among them."""

    def __init__(
        self,
        services: Sequence[str],
        beside: Mapping[str, str],
        namespace: str,
        connect: Connect = in_cluster,
    ) -> None:
        self._services, self._beside = services, dict(beside)
        self._namespace, self._connect = namespace, connect
        self._slices: dict[str, dict[str, str]] = {}
        """Name of a slice -> its pods, name -> address."""

    async def watch(self) -> AsyncIterator[Mapping[str, str]]:
        """All pods now and after each change; does not end by itself.

        Raises OSError outside of a cluster.
        """
        last: Mapping[str, str] | None = None
        namespace = self._namespace
        async with self._connect() as api:
            while True:
                async for pods in self._follow(api, namespace):
                    if pods != last:
                        last = pods
                        yield pods

    async def _follow(self, api: Any, namespace: str) -> AsyncIterator[Mapping[str, str]]:
        """List, watch, and list again, until something breaks; then wait a little."""
        import aiohttp
        from kubernetes.aio.client import ApiException

        backoff = MIN_BACKOFF_S
        while True:
            try:
                version = await self._list(api, namespace)
                yield self._pods()
                backoff = MIN_BACKOFF_S
                async for event in self._events(api, namespace, version):
                    self._apply(event, namespace)
                    yield self._pods()
            except _Again as reason:
                logger.debug("pods are listed again: %s", reason)
            except ApiException as error:
                refused = (
                    "; may this account list endpointslices?" if error.status == FORBIDDEN else ""
                )
                logger.warning("Kubernetes answers %s%s", error.status, refused)
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                logger.warning("Kubernetes cannot be asked for pods: %s", error or "no answer")
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _list(self, api: Any, namespace: str) -> str:
        """Take in all slices; returns the version to watch from."""
        async with asyncio.timeout(REQUEST_S):
            answer = await api.list_namespaced_endpoint_slice_without_preload_content(
                namespace, label_selector=self._selector()
            )
            page = _object(await answer.read(), answer.status)
        self._slices = {
            each["metadata"]["name"]: _pods_of(each, namespace) for each in page["items"] or ()
        }
        return str(page["metadata"]["resourceVersion"])

    async def _events(
        self, api: Any, namespace: str, version: str
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Changes since a version. Raises _Again when there will be no more."""
        async with asyncio.timeout(RESYNC_S + SILENCE_S):
            answer = await api.list_namespaced_endpoint_slice_without_preload_content(
                namespace, label_selector=self._selector(), watch=True, resource_version=version,
                timeout_seconds=RESYNC_S,
                _request_timeout=RESYNC_S + SILENCE_S,
            )  # fmt: skip
            try:
                rest = b""
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    if len(rest) > MAX_EVENT_BYTES:
                        raise ValueError("an event has no end")
                    for line in lines:
                        if line.strip():
                            yield _object(line, answer.status)
            finally:
                answer.release()
        raise _Again("the watch has ended")

    def _apply(self, event: Mapping[str, Any], namespace: str) -> None:
        """One change. Raises _Again on an error, which ends a watch."""
        kind, subject = event["type"], event["object"]
        if kind == "ERROR":
            raise _Again(f"{subject.get('code')} {subject.get('message')}")
        if kind in ("ADDED", "MODIFIED"):
            self._slices[subject["metadata"]["name"]] = _pods_of(subject, namespace)
        elif kind == "DELETED":
            self._slices.pop(subject["metadata"]["name"], None)

    def _selector(self) -> str:
        return f"{SERVICE_LABEL} in ({','.join(self._services)})"

    def _pods(self) -> Mapping[str, str]:
        found = dict(self._beside)
        for pods in self._slices.values():
            found |= pods
        return found


def _object(text: bytes, status: int) -> Mapping[str, Any]:
    """A JSON object. Raises ValueError when it is none, ApiException for an error's status."""
    if status >= 400:
        from kubernetes.aio.client import ApiException

        raise ApiException(status=status)
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("Kubernetes' answer is no object")
    return found


def _pods_of(slice_: Mapping[str, Any], namespace: str) -> dict[str, str]:
    """Pods of one slice, name -> address: by their names in DNS where they have one."""
    ports = [p["port"] for p in slice_.get("ports") or () if p.get("name") == PORT_NAME]
    service = slice_["metadata"]["labels"][SERVICE_LABEL]
    pods = {}
    for endpoint in slice_.get("endpoints") or ():
        name = (endpoint.get("targetRef") or {}).get("name")
        if not ports or name is None or not endpoint.get("addresses"):
            continue
        host = endpoint["addresses"][0]
        if endpoint.get("hostname"):
            host = f"{endpoint['hostname']}.{service}.{namespace}.svc"
        pods[name] = f"[{host}]:{ports[0]}" if ":" in host else f"{host}:{ports[0]}"
    return pods
