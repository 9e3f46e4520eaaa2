"""What a worker needs to exchange blocks with others: an endpoint, and what goes over it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quire.cluster.rpc import Cluster
from quire.transfer.group import GroupEndpoint
from quire.transfer.layout import BlockLayout, Shard
from quire.transfer.negotiate import Identity
from quire.worker.probe import Prober
from quire.worker.roles.decode import DecodeRole
from quire.worker.roles.fetch import FetchRole
from quire.worker.roles.peers import Peers
from quire.worker.roles.prefill import PREFIX, PrefillRole
from quire.worker.roles.source import SourceRole
from quire.worker.standing import Role

if TYPE_CHECKING:
    from quire.config.transfer import TransferConfig
    from quire.engine.loop import EngineLoop
    from quire.engine.parallel.gang import Gang
    from quire.engine.request import EngineRequest
    from quire.engine.scheduler.remote import BlocksReady, PrefillNeeded
    from quire.proto import transfer_pb2, worker_pb2
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.group import Ranks
    from quire.transfer.state import Event
    from quire.worker.metrics import EngineMetrics


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


@dataclass(frozen=True)
class Surroundings:
    """What blocks are exchanged for."""

    loop: EngineLoop
    incarnation: int
    metrics: EngineMetrics


@dataclass
class Disaggregation:
    """Everything that goes over one endpoint. Lives on the event loop."""

    endpoint: Endpoint
    peers: Peers
    decode: DecodeRole
    """Prompts that others compute."""
    prefill: PrefillRole
    """Prompts computed for others."""
    fetch: FetchRole
    """Requests that others had."""
    source: SourceRole
    """Blocks of requests that others have now."""
    known_as: transfer_pb2.Hello
    """How others reach this worker for blocks, and what they must agree on with it."""
    prober: Prober

    @classmethod
    def start(cls, options: TransferOptions, around: Surroundings) -> Disaggregation:
        """Listen for KV blocks. Raises OSError, or ValueError when a pool in device memory is given
        too little staging."""
        loop = around.loop
        model = loop.engine.model
        backend = model.runner.backend
        identity = Identity(
            layout=BlockLayout.of(
                backend.layout,
                model=model.fingerprint.hex(),
                numerics=model.numerics,
                num_kv_heads=model.config.num_kv_heads,
            ),
            shard=Shard(0, 1 if model.gang is None else model.gang.size),
            worker=options.worker,
            incarnation=around.incarnation,
            heartbeat_s=options.config.kv_heartbeat_s,
            token=options.config.cluster_token or "",
        )
        events = _Events(asyncio.get_running_loop())
        memory = backend.kv_memory(options.config.kv_staging_bytes)
        ranks = None if model.gang is None else gang_ranks(model.gang)
        endpoint = GroupEndpoint(options.config, identity, memory, events, ranks)
        me = endpoint.start()
        around.metrics.show_transfers(endpoint.counters)
        known_as = identity.hello(me.listeners, options.config.kv_transports)
        known_as.ClearField("nonce")
        prober = Prober(endpoint, options.config.kv_transports)
        peers = Peers(Cluster(options.config))
        decode = DecodeRole(loop, endpoint, me, peers)
        prefill = PrefillRole(loop, endpoint)
        fetch = FetchRole(loop, endpoint, me, peers, around.metrics)
        source = SourceRole(loop, endpoint)
        events.roles = (decode, prefill, fetch, source)
        return cls(endpoint, peers, decode, prefill, fetch, source, known_as, prober)

    @property
    def num_jobs(self) -> int:
        """What is being done for other workers."""
        return len(self.prefill) + len(self.source)

    def with_remote_prompt(
        self, request: EngineRequest, submit: worker_pb2.Submit
    ) -> EngineRequest:
        """The request as the engine gets it: its prompt from elsewhere, if that was asked for."""
        return replace(request, remote=self.decode.prompt(request.request_id, submit))

    def prefill_needed(self, needed: list[PrefillNeeded]) -> None:
        """Prompts were admitted and wait."""
        for entry in needed:
            self.decode.on_prefill_needed(entry)

    def blocks_ready(self, ready: list[BlocksReady]) -> None:
        """Blocks for other workers are computed."""
        for entry in ready:
            self.prefill.on_blocks_ready(entry)

    def add_rates(self, load: worker_pb2.Load) -> None:
        """How fast blocks reach this worker, and from whom."""
        for peer, rate in self.endpoint.counters.flows.receive_rates().items():
            load.transfer_rates.add(peer=peer, bytes_per_s=rate)

    async def close(self) -> None:
        """End every transfer and connection."""
        self.decode.close()
        await self.fetch.close()
        await self.peers.close()
        await asyncio.to_thread(self.endpoint.close)


def gang_ranks(gang: Gang) -> Ranks:
    """The endpoints of the other ranks of a tensor-parallel engine."""
    from quire.engine.parallel.kv import GangRanks

    return GangRanks(gang.calls)


class _Events:
    """Carries the endpoint's events from its thread to the roles' event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.roles: tuple[DecodeRole | PrefillRole | FetchRole | SourceRole, ...] = ()

    def __call__(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_on, event)

    def _hand_on(self, event: Event) -> None:
        for role in self.roles:
            role.on_event(event)
