"""What a worker shows of its engine's blocks while prompts are computed."""

from __future__ import annotations

from engines import make_engine, make_request
from prometheus_client.registry import CollectorRegistry

from quire.engine.loop import EngineLoop
from quire.telemetry import metrics as m
from quire.worker.metrics import EngineMetrics


def test_promised_blocks_are_shown_beside_those_of_each_state() -> None:
    engine = make_engine(num_blocks=64, max_num_batched_tokens=16)
    instruments = m.engine_instruments(CollectorRegistry(), model_name="x")
    shown = EngineMetrics(instruments)

    def values() -> tuple[float, float, float]:
        shown.state(EngineLoop(engine, None).state, 0.0)  # type: ignore[arg-type]
        states = [instruments.get(m.KV_BLOCKS, s).value for s in ("free", "cached", "owned")]
        assert sum(states) == 64
        return states[2], instruments.get(m.KV_PROMISED_BLOCKS).value, sum(states[:2])

    assert values() == (0, 0, 64)
    engine.add_request(make_request("a", list(range(1, 41)) * 4, max_tokens=1))  # ten blocks
    engine.step()
    owned, promised, others = values()
    assert owned + promised >= 10
    assert 0 < promised <= others
    while engine.has_work:
        engine.step()
    assert values() == (0, 0, 64)
