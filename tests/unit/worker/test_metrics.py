"""What a worker's gauges show of its engine."""

from __future__ import annotations

from prometheus_client import generate_latest

from quire.engine.loop import EngineState
from quire.engine.pace import Rates
from quire.telemetry import metrics as m
from quire.telemetry.instruments import new_registry
from quire.worker.metrics import EngineMetrics


def shown(**changes) -> dict[str, float]:
    """Gauges of an idle engine with `changes`, by name and labels that differ."""
    numbers = dict.fromkeys(EngineState.__dataclass_fields__, 0)
    state = EngineState(**numbers | {"rates": Rates(0.0, 0.0, 0.0), "blocks_free": 10} | changes)
    registry = new_registry("engine")
    EngineMetrics(m.engine_instruments(registry, model_name="x")).state(state, 0.0)
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line.startswith("quire_kv_"))
    return {name.replace('model_name="x"', ""): float(value) for name, value in samples}


def test_promised_blocks_are_shown_beside_the_pool() -> None:
    gauges = shown(blocks_free=90, blocks_cached=8, blocks_owned=2, blocks_promised=7)
    [promised] = [v for name, v in gauges.items() if name.startswith("quire_kv_promised_blocks")]
    assert promised == 7
    assert sum(v for name, v in gauges.items() if name.startswith("quire_kv_blocks{")) == 100
