"""What a worker needs to exchange prompts with others: an endpoint for KV blocks, both roles."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from quire.cluster.rpc import Cluster
from quire.transfer.endpoint import Endpoint
from quire.transfer.layout import BlockLayout, Shard
from quire.transfer.memory import PoolMemory
from quire.transfer.negotiate import Identity
from quire.worker.roles.decode import DecodeRole
from quire.worker.roles.prefill import PREFIX, PrefillRole

if TYPE_CHECKING:
    from quire.config.transfer import TransferConfig
    from quire.engine.loop import EngineLoop
    from quire.engine.request import EngineRequest
    from quire.engine.scheduler.remote import BlocksReady, PrefillNeeded
    from quire.proto import worker_pb2
    from quire.transfer.state import Event


class Role(StrEnum):
    """What a worker is for. A routing weight and no more: every worker can do everything."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefill_weight(self) -> float:
        """Share of prefill work it should get while others can do it."""
        return 0.0 if self is Role.DECODE else 1.0

    @property
    def decode_weight(self) -> float:
        """Share of decode work it should get while others can do it."""
        return 0.0 if self is Role.PREFILL else 1.0


@dataclass(frozen=True)
class TransferOptions:
    """How this worker is known to others and reaches them."""

    worker: str
    """Stable name of the pod."""
    config: TransferConfig
    role: Role = Role.BOTH


def is_export(engine_id: str) -> bool:
    """The engine computes this request for another worker."""
    return engine_id.startswith(PREFIX)


class Disaggregation:
    """Both roles of a worker over one endpoint. Lives on the event loop."""

    def __init__(
        self, endpoint: Endpoint, decode: DecodeRole, prefill: PrefillRole, role: Role
    ) -> None:
        self.role = role
        self._endpoint = endpoint
        self._decode = decode
        self.prefill = prefill

    @classmethod
    def start(cls, loop: EngineLoop, options: TransferOptions, incarnation: int) -> Disaggregation:
        """Listen for KV blocks. Raises OSError, or ValueError without a pool in host memory."""
        model = loop.engine.model
        backend = model.runner.backend
        pool = backend.host_pool()
        if pool is None:
            raise ValueError("KV blocks can be exchanged only from host memory so far")
        identity = Identity(
            layout=BlockLayout.of(backend.layout, model=model.fingerprint.hex()),
            shard=Shard(0, 1),
            worker=options.worker,
            incarnation=incarnation,
            heartbeat_s=options.config.kv_heartbeat_s,
            token=options.config.cluster_token or "",
        )
        events = _Events(asyncio.get_running_loop())
        memory = PoolMemory(pool, backend.layout.block_bytes)
        endpoint = Endpoint(options.config, identity, memory, events)
        peer = endpoint.start()
        decode = DecodeRole(loop, endpoint, peer, Cluster(options.config))
        prefill = PrefillRole(loop, endpoint)
        events.roles = (decode, prefill)
        return cls(endpoint, decode, prefill, options.role)

    def with_remote_prompt(
        self, request: EngineRequest, submit: worker_pb2.Submit
    ) -> EngineRequest:
        """The request as the engine gets it: its prompt from elsewhere, if that was asked for."""
        return replace(request, remote=self._decode.prompt(request.request_id, submit))

    def prefill_needed(self, needed: list[PrefillNeeded]) -> None:
        """Prompts were admitted and wait."""
        for entry in needed:
            self._decode.on_prefill_needed(entry)

    def blocks_ready(self, ready: list[BlocksReady]) -> None:
        """Blocks for other workers are computed."""
        for entry in ready:
            self.prefill.on_blocks_ready(entry)

    async def close(self) -> None:
        """End every transfer and connection."""
        await self._decode.close()
        await asyncio.to_thread(self._endpoint.close)


class _Events:
    """Carries the endpoint's events from its thread to the roles' event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.roles: tuple[DecodeRole, PrefillRole] | None = None

    def __call__(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_on, event)

    def _hand_on(self, event: Event) -> None:
        if self.roles is not None:
            for role in self.roles:
                role.on_event(event)
