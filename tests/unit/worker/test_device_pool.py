"""A worker whose KV cache is in a GPU's memory, told apart by the backend alone."""

from __future__ import annotations

import pytest
from inprocess import LocalWorker

from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig
from quire.engine.engine import Engine
from quire.worker.disaggregation import TransferOptions
from quire.worker.standing import Role


@pytest.fixture
def on_device(monkeypatch):
    load = Engine.load

    def loaded(*args) -> Engine:
        engine = load(*args)
        monkeypatch.setattr(engine.model.runner.backend, "host_pool", lambda: None)
        return engine

    monkeypatch.setattr(Engine, "load", loaded)
    return EngineConfig(kv_cache_memory_bytes=64 << 20, num_threads=1)


async def test_it_works_alone_where_it_does_both_jobs(on_device, tmp_path, caplog) -> None:
    worker = await LocalWorker(tmp_path, "alone").start(on_device, TransferConfig())
    try:
        assert "the KV cache is in device memory" in caplog.text
        assert worker.service.ready
        with pytest.raises(ValueError, match="only from host memory"):
            worker.service.attach(
                worker.engine, TransferOptions("x", TransferConfig(), Role.DECODE)
            )
    finally:
        await worker.stop()
