"""Tells Kubernetes that a router has a pod: the condition that the pod's readiness gate waits for.

    worker ready -> in a router's fleet, taking requests -> condition True -> Ready

So an update that routers cannot follow (another certificate, a closed port, a name that does not
resolve) stops at its first pod, which a pod's own probe would not notice. A condition stays once it
is there: routers that are away take no pod with them, they only let no new one become ready.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.router.pod_updates import Update

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from quire.router.fleet import Fleet

CONDITION = "quire/routed"
PERIOD_S = 1.0


def readiness_gates(fleet: Fleet, namespace: str) -> Update:
    """Of every pod that takes requests: told again when another process answers by its name."""

    def patch(api: Any, pod: str, _: int) -> Awaitable[object]:
        condition = {"type": CONDITION, "status": "True", "reason": "InAFleet"}
        body = {"status": {"conditions": [condition]}}
        told: Awaitable[object] = api.patch_namespaced_pod_status(pod, namespace, body)
        return told

    return Update("readiness gate", fleet.serving, patch, PERIOD_S)
