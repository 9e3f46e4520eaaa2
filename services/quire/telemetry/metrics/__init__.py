"""Every Prometheus metric of Quire, declared once: a module of this package for each subject.

Dashboards, alerts, autoscaler queries and docs/metrics.md are made from or checked against
DECLARATIONS. Names follow Prometheus conventions under `quire_`; the engine's carry vLLM's name as
an alias where one exists, so that existing dashboards and autoscalers work. A gateway never exports
`vllm:` names: a sum over pods would count twice.

    instruments = engine_instruments(registry, model_name="demo", engine="0")
    running = instruments.get(REQUESTS_RUNNING)         # keep it; get() is a look-up
    running.set(3)
    instruments.get(REQUESTS_FINISHED, "stop").inc()
    instruments.get(INTER_TOKEN_LATENCY).observe(0.012, count=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.telemetry.instruments import Declaration, Instruments
from quire.telemetry.metrics import engine, gateway, kv_transfer, requests, router
from quire.telemetry.metrics.engine import *
from quire.telemetry.metrics.gateway import *
from quire.telemetry.metrics.kv_transfer import *
from quire.telemetry.metrics.requests import *
from quire.telemetry.metrics.router import *

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

DECLARATIONS: tuple[Declaration[Any], ...] = tuple(
    value
    for subject in (engine, kv_transfer, requests, gateway, router)
    for value in vars(subject).values()
    if isinstance(value, Declaration)
)


def engine_instruments(
    registry: CollectorRegistry, *, model_name: str, engine: str = "0"
) -> Instruments:
    """The engine's metrics, registered. `engine` numbers the replica, as in vLLM."""
    labels = {"model_name": model_name, "engine": engine}
    return Instruments("engine", DECLARATIONS, registry, labels)


def gateway_instruments(registry: CollectorRegistry) -> Instruments:
    """The gateway's metrics, registered."""
    return Instruments("gateway", DECLARATIONS, registry)


def router_instruments(registry: CollectorRegistry) -> Instruments:
    """The router's metrics, registered."""
    return Instruments("router", DECLARATIONS, registry)
