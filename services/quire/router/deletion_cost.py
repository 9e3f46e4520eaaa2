"""Tells Kubernetes which pods a scale-down costs least, by how busy this router sees them.

A ReplicaSet deletes the pods with the lowest cost first; a StatefulSet does not ask. Several
routers say nearly the same, the last word counts. What they say is coarse, so that it seldom
changes: each change is an update of a pod for everybody who watches pods.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quire.router.pod_updates import Update

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from quire.router.fleet import Fleet

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
PERIOD_S = 10.0
"""An autoscaler looks every 15 s: it decides by costs of a moment ago."""
LEVELS_OF_CACHE = 4


def cost(running: float, wait_s: float, cached_share: float) -> int:
    """0 for an idle pod with an empty cache; work counts by its order of magnitude, before cache.

    `running` are streams, `wait_s` seconds of queued prefill, `cached_share` is between 0 and 1.
    """
    work = math.ceil(math.log2(1 + max(running, 0.0) + max(wait_s, 0.0)))
    return work * (LEVELS_OF_CACHE + 1) + round(LEVELS_OF_CACHE * min(max(cached_share, 0.0), 1.0))


def deletion_costs(fleet: Fleet, namespace: str) -> Update:
    """Of every pod of the fleet."""

    def patch(api: Any, pod: str, value: int) -> Awaitable[object]:
        body = {"metadata": {"annotations": {ANNOTATION: str(value)}}}
        told: Awaitable[object] = api.patch_namespaced_pod(pod, namespace, body)
        return told

    def values() -> dict[str, int]:
        return {pod: cost(*fleet.work_of(pod)) for pod in fleet.pods}

    return Update("deletion cost", values, patch, PERIOD_S)
