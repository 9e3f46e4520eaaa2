"""What `Watch` tells of a loaded worker: the model, then load and cache events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from quire.proto import worker_pb2
from quire.worker import convert
from quire.worker.cache_feed import CacheFeed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from quire.engine.loop import EngineLoop
    from quire.worker.disaggregation import Disaggregation
    from quire.worker.standing import Standing

LOAD_S = 1.0
EVENTS_S = 0.05


async def updates(
    loop: EngineLoop,
    standing: Standing,
    model: worker_pb2.ModelInfo,
    request: worker_pb2.WatchRequest,
    exchange: Disaggregation | None,
) -> AsyncIterator[worker_pb2.WorkerUpdate]:
    """Until the worker ends. The load is told once a second, and when the standing changes."""
    if exchange is not None:
        model.kv.CopyFrom(exchange.known_as)
    yield worker_pb2.WorkerUpdate(model=model)
    feed = CacheFeed(model.incarnation, request) if request.cache_events else None
    period = LOAD_S if feed is None else EVENTS_S
    next_load, told = 0.0, standing.told
    while not standing.is_over:
        now = asyncio.get_running_loop().time()
        if now >= next_load or standing.told != told:
            next_load, told = now + LOAD_S, standing.told
            load = convert.load_to(loop.state, loop.stalled_s())
            if exchange is not None:
                exchange.add_rates(load)
            yield worker_pb2.WorkerUpdate(load=convert.with_standing(load, standing))
        if feed is not None:
            for update in await feed.updates(loop):
                yield update
        await standing.changed(period)
