"""The gateway's tokenizer: fetched again while the hub does not give it, given up for the rest."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from waiting import until

from quire.config.gateway import GatewayConfig, TokenizerConfig
from quire.gateway import served_model as module
from quire.gateway.served_model import ModelLoader
from quire.proto.worker_pb2 import ModelInfo
from quire.text.folder import ModelNotFound, locate
from quire.text.hub import HubUnreachable


class ReadyWorkers:
    """One is there, and stays."""

    ready = True
    startup = SimpleNamespace(phase="")

    async def wait_ready(self) -> ModelInfo:
        return ModelInfo(model="org/m")

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def answers(monkeypatch):
    """What the hub answers with, one after another; then with the demo model's folder."""
    raised: list[Exception] = []

    def resolve(model: str, revision: str | None):
        if raised:
            raise raised.pop(0)
        return locate("demo")

    monkeypatch.setattr(module, "resolve_folder", resolve)
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    return raised


@pytest.mark.parametrize("own", [None, "org/m"], ids=["of the model", "of its own"])
async def test_a_hub_that_comes_back_is_asked_again(answers, own) -> None:
    answers += [HubUnreachable("not now"), HubUnreachable("not now")]
    loader = ModelLoader(GatewayConfig(), TokenizerConfig(tokenizer=own), ReadyWorkers())
    running = asyncio.create_task(loader.run())
    await until(lambda: loader.served is not None)
    assert loader.failure is None
    running.cancel()


async def test_what_must_be_changed_is_said_and_not_tried_again(answers) -> None:
    answers += [ModelNotFound("no tokenizer.json in /m")]
    loader = ModelLoader(GatewayConfig(), TokenizerConfig(), ReadyWorkers())
    await loader.run()
    assert loader.failure == "no tokenizer: no tokenizer.json in /m"
    assert loader.served is None
