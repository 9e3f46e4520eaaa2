"""Commands to a worker as a whole, once its engine is loaded: what `Control` does."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from quire.proto import worker_pb2
from quire.worker.roles.engine_calls import on_engine
from quire.worker.standing import Weights

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop
    from quire.worker.disaggregation import Disaggregation
    from quire.worker.standing import Standing

logger = logging.getLogger(__name__)

SLEEP_TIMEOUT_S = 30.0
IDLE_POLL_S = 0.02


class Commands:
    """Lives on the event loop."""

    def __init__(
        self,
        loop: EngineLoop,
        standing: Standing,
        exchange: Disaggregation | None,
        *,
        has_pinned_pool: bool,
    ) -> None:
        self._loop = loop
        self._standing = standing
        self._exchange = exchange
        self._has_pinned_pool = has_pinned_pool
        """A network device may know the pool's pages: they must stay where they are."""
        self._falling_asleep = asyncio.Lock()

    async def run(self, request: worker_pb2.ControlRequest) -> worker_pb2.ControlReply:
        """Carry out one command. Raises ValueError when it is none of those."""
        command = request.WhichOneof("command")
        try:
            if command == "drain":
                return self._drain(request.drain)
            if command == "set_role":
                return self._set_role(request.set_role)
            if command == "sleep":
                async with self._falling_asleep:
                    return await self._sleep(request.sleep)
            if command == "wake":
                async with self._falling_asleep:
                    return self._wake()
            if command == "probe":
                return await self._probe(request.probe)
            if command == "reset_prefix_cache":
                count = await on_engine(self._loop, lambda engine: engine.reset_prefix_cache())
                return _done(f"forgot {count} blocks")
        except TimeoutError:
            return _refused("the engine does not answer")
        raise ValueError(f"no such command: {command}")

    async def _probe(self, probe: worker_pb2.Probe) -> worker_pb2.ControlReply:
        if self._exchange is None:
            return _refused("this worker exchanges no KV blocks")
        try:
            return await self._exchange.prober.run(probe)
        except ValueError as error:
            return _refused(str(error))

    def is_idle(self) -> bool:
        """The engine holds no request and no block for another worker. True only between steps."""
        state = self._loop.state
        return not (state.running or state.waiting or state.blocks_owned)

    def _drain(self, drain: worker_pb2.Drain) -> worker_pb2.ControlReply:
        default = self._loop.engine.config.drain_timeout_s
        timeout_s = drain.timeout_ms / 1000 if drain.HasField("timeout_ms") else default
        self._standing.drain(timeout_s)
        logger.info("draining for up to %g s", timeout_s)
        return _done("draining")

    def _set_role(self, role: worker_pb2.SetRole) -> worker_pb2.ControlReply:
        try:
            weights = Weights(role.prefill_weight, role.decode_weight)
        except ValueError as error:
            return _refused(str(error))
        self._standing.set_weights(weights)
        logger.info("role: prefill %g, decode %g", weights.prefill, weights.decode)
        return _done(f"prefill {weights.prefill:g}, decode {weights.decode:g}")

    async def _sleep(self, sleep: worker_pb2.Sleep) -> worker_pb2.ControlReply:
        if sleep.level != 1:
            return _refused("only sleep level 1 works: the KV cache is dropped, the weights stay")
        if self._has_pinned_pool:
            return _refused("the KV cache is registered with nixl and cannot be dropped")
        if self._standing.is_draining:
            return _refused("the worker is draining")
        if self._standing.is_sleeping:
            return _done("it sleeps already")
        self._standing.set_sleeping(True)
        try:
            freed = await self._drop_cache(sleep)
        except TimeoutError:
            self._standing.set_sleeping(False)
            return _refused("requests are still running: the worker stays awake")
        except ValueError as error:
            self._standing.set_sleeping(False)
            return _refused(str(error))
        logger.info("asleep: gave back %d bytes", freed)
        return worker_pb2.ControlReply(ok=True, message="asleep", freed_bytes=freed)

    async def _drop_cache(self, sleep: worker_pb2.Sleep) -> int:
        """Raises TimeoutError, and ValueError where the memory cannot be given back."""
        timeout_s = sleep.timeout_ms / 1000 if sleep.HasField("timeout_ms") else SLEEP_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        while True:
            # what was sent before the worker refused is in the inbox, ahead of this
            freed = await on_engine(self._loop, _drop_if_idle)
            if isinstance(freed, str):
                raise ValueError(freed)
            if freed is not None:
                return freed
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.sleep(IDLE_POLL_S)

    def _wake(self) -> worker_pb2.ControlReply:
        if not self._standing.is_sleeping:
            return _done("it is awake")
        self._standing.set_sleeping(False)  # the cache's memory comes back as it is written
        logger.info("awake")
        return _done("awake")


def _drop_if_idle(engine: Engine) -> int | str | None:
    """Bytes given back; None while something is held; a text when it cannot be done."""
    if engine.has_work or engine.scheduler.request_ids or engine.pool.counts().owned:
        return None
    try:
        return engine.drop_cache()
    except ValueError as error:
        return str(error)


def _done(message: str) -> worker_pb2.ControlReply:
    return worker_pb2.ControlReply(ok=True, message=message)


def _refused(message: str) -> worker_pb2.ControlReply:
    return worker_pb2.ControlReply(ok=False, message=message)
