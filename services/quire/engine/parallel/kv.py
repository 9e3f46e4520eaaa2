"""KV transfer of the ranks beyond the first: rank 0 says what to do, each rank has its endpoint.

    rank 0  ── {"verb": "grant", "ref": […], "args": […]} ──▶  rank r    a verb of `Endpoint`
            ◀─ {"event": ["delivered", …], "ref": […]} ──────            what came of it
            ── {"verb": "start" | "fence", "call": n, …} ────▶            answered by
            ◀─ {"call": n, "result": … | "error": "…"} ──────

Verbs are carried out while a step runs: a step that rank 0 has finished (`Backend.finish`) has
written and read its last block on every rank, because its last exchange comes after the last
attention.
"""

from __future__ import annotations

import itertools
import json
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from quire.config.base import from_mapping, to_mapping
from quire.config.transfer import TransferConfig
from quire.proto import transfer_pb2
from quire.transfer.endpoint import START_TIMEOUT_S, Endpoint
from quire.transfer.group import identity_of
from quire.transfer.layout import BlockLayout, Shard
from quire.transfer.negotiate import Identity, Peer
from quire.transfer.state import Commit, Delivered, Ended, Failure, Released, TransferRef

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.engine.parallel.gang import Gang
    from quire.engine.runner.backend import Backend
    from quire.transfer.group import Leg
    from quire.transfer.state import Event


class GangRanks:
    """The endpoints of the other ranks, for rank 0's. See `quire.transfer.group.Ranks`."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self._numbers = itertools.count()
        self._calls: dict[int, Future[Any]] = {}
        self._on_event: Callable[[int, Event], None] | None = None

    def start(
        self, config: TransferConfig, identity: Identity, on_event: Callable[[int, Event], None]
    ) -> tuple[Peer, ...]:
        """Have every rank listen; how each is reached. Raises OSError when one cannot."""
        self._on_event = on_event
        self._gang.hear(self._hear)
        ranks = range(1, identity.shard.degree)
        calls = [
            self._call(
                rank,
                "start",
                config=to_mapping(config_of(config, rank)),
                identity=asdict(identity_of(identity, rank)),
            )
            for rank in ranks
        ]
        return tuple(_peer(call.result(START_TIMEOUT_S)) for call in calls)

    def expect(self, leg: Leg, num_blocks: int, degree: int | None, lease_s: float) -> None:
        """See `Endpoint.expect`."""
        self._tell(leg, "expect", num_blocks, degree, lease_s)

    def grant(self, leg: Leg, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.grant`."""
        self._tell(leg, "grant", first, list(slots))

    def renew(self, leg: Leg) -> None:
        """See `Endpoint.renew`."""
        self._tell(leg, "renew")

    def send(self, leg: Leg, peer: Peer, lease_s: float) -> None:
        """See `Endpoint.send`."""
        self._tell(leg, "send", peer.to_proto().SerializeToString().hex(), lease_s)

    def offer(self, leg: Leg, first: int, slots: Sequence[int]) -> None:
        """See `Endpoint.offer`."""
        self._tell(leg, "offer", first, list(slots))

    def commit(self, leg: Leg, commit: Commit) -> None:
        """See `Endpoint.commit`."""
        self._tell(leg, "commit", commit.blocks, commit.tokens, commit.meta.hex())

    def cancel(self, leg: Leg) -> None:
        """See `Endpoint.cancel`."""
        self._tell(leg, "cancel")

    def fence(self, leg: Leg, timeout_s: float) -> None:
        """See `Endpoint.fence`. Raises TimeoutError."""
        self._call(leg[0], "fence", ref=leg[1], timeout_s=timeout_s).result(timeout_s)

    def _tell(self, leg: Leg, verb: str, *args: object) -> None:
        self._say(leg[0], {"verb": verb, "ref": leg[1], "args": args})

    def _call(self, rank: int, verb: str, **args: object) -> Future[Any]:
        number, answer = next(self._numbers), Future[Any]()
        self._calls[number] = answer
        self._say(rank, {"verb": verb, "call": number, **args})
        return answer  # it may have come already: then the call is no longer in `_calls`

    def _say(self, rank: int, message: dict[str, object]) -> None:
        self._gang.tell(rank, json.dumps(message).encode())

    def _hear(self, rank: int, payload: bytes) -> None:
        """On the gang's thread."""
        message = json.loads(payload)
        if "event" in message:
            if self._on_event is not None:
                self._on_event(rank, _event(message))
        elif (call := self._calls.pop(message["call"], None)) is not None:
            if "error" in message:
                call.set_exception(OSError(message["error"]))
            else:
                call.set_result(message["result"])


class RankEndpoint:
    """A rank's endpoint, led by rank 0. `answer` sends to rank 0, from any thread."""

    def __init__(self, backend: Backend, answer: Callable[[bytes], None]) -> None:
        self._backend = backend
        self._answer = answer
        self._endpoint: Endpoint | None = None

    def obey(self, payload: bytes) -> None:
        """Carry out one verb. Raises ValueError for what is none."""
        message = json.loads(payload)
        verb, call = message["verb"], message.get("call")
        if verb == "start":
            self._reply(call, lambda: self._start(message["config"], message["identity"]))
            return
        ref = TransferRef(*message["ref"])
        if self._endpoint is None:
            raise ValueError(f"{verb} before start")
        if verb == "fence":
            endpoint, timeout_s = self._endpoint, message["timeout_s"]
            self._reply(call, lambda: endpoint.fence(ref, timeout_s))
        else:
            _carry_out(self._endpoint, verb, ref, message["args"])

    def _start(self, config: dict[str, Any], identity: dict[str, Any]) -> str:
        parts = {"layout": BlockLayout(**identity["layout"]), "shard": Shard(**identity["shard"])}
        options = from_mapping(TransferConfig, config)
        memory = self._backend.kv_memory(options.kv_staging_bytes)
        self._endpoint = Endpoint(options, Identity(**identity | parts), memory, self._tell)
        return self._endpoint.start().to_proto().SerializeToString().hex()

    def _reply(self, call: int, action: Callable[[], object]) -> None:
        try:
            message: dict[str, object] = {"call": call, "result": action()}
        except (OSError, ValueError) as error:  # TimeoutError is one
            message = {"call": call, "error": str(error) or type(error).__name__}
        self._answer(json.dumps(message).encode())

    def _tell(self, event: Event) -> None:
        self._answer(json.dumps({"ref": event.ref, "event": _words(event)}).encode())


def config_of(config: TransferConfig, rank: int) -> TransferConfig:
    """The options of one rank on rank 0's host: fixed ports count up from rank 0's."""
    return replace(
        config,
        kv_tcp_port=config.kv_tcp_port and config.kv_tcp_port + rank,
        kv_grpc_port=config.kv_grpc_port and config.kv_grpc_port + rank,
    )


def _carry_out(endpoint: Endpoint, verb: str, ref: TransferRef, args: list[Any]) -> None:
    match verb, args:
        case "expect", [num_blocks, degree, lease_s]:
            endpoint.expect(ref, num_blocks, degree=degree, lease_s=lease_s)
        case "grant", [first, slots]:
            endpoint.grant(ref, first, slots)
        case "renew", []:
            endpoint.renew(ref)
        case "send", [peer, lease_s]:
            endpoint.send(ref, _peer(peer), lease_s=lease_s)
        case "offer", [first, slots]:
            endpoint.offer(ref, first, slots)
        case "commit", [blocks, tokens, meta]:
            endpoint.commit(ref, blocks=blocks, tokens=tokens, meta=bytes.fromhex(meta))
        case "cancel", []:
            endpoint.cancel(ref)
        case _:
            raise ValueError(f"no such verb: {verb} {args}")


def _peer(text: str) -> Peer:
    return Peer.from_proto(transfer_pb2.KvPeer.FromString(bytes.fromhex(text)))


def _words(event: Event) -> list[object]:
    match event:
        case Delivered(_, block, slot):
            return ["delivered", block, slot]
        case Released(_, slots):
            return ["released", slots]
        case Ended(_, failure, detail, commit):
            done = commit and [commit.blocks, commit.tokens, commit.meta.hex(), commit.digest]
            return ["ended", failure, detail, done]


def _event(message: dict[str, Any]) -> Event:
    """Raises ValueError for what is no event."""
    ref = TransferRef(*message["ref"])
    match message["event"]:
        case ["delivered", block, slot]:
            return Delivered(ref, block, slot)
        case ["released", slots]:
            return Released(ref, tuple(slots))
        case ["ended", failure, detail, None]:
            return Ended(ref, failure and Failure(failure), detail)
        case ["ended", failure, detail, [blocks, tokens, meta, digest]]:
            commit = Commit(blocks, tokens, bytes.fromhex(meta), digest)
            return Ended(ref, failure and Failure(failure), detail, commit)
    raise ValueError(f"no such event: {message['event']}")
