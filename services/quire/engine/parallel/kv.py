"""KV transfer of the ranks beyond the first: rank 0 says what to do, each rank has its endpoint.

    rank 0  ── {"verb": "grant", "ref": […], "args": […]} ──▶  rank r    a verb of `Endpoint`
            ◀─ {"event": ["delivered", …], "ref": […]} ──────            what came of it

`start` and `fence` are answered; see `calls`. Verbs are carried out while a step runs: a step that
rank 0 has finished (`ModelRunner.launch`) has written and read its last block on every rank,
because its last exchange comes after the last attention and waits for all of them, in a step that
draws nothing too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.config.address import ANY_HOST
from quire.config.base import from_mapping, to_mapping
from quire.config.transfer import TransferConfig
from quire.engine.parallel.calls import answer_to
from quire.proto import transfer_pb2
from quire.transfer.endpoint import START_TIMEOUT_S, Endpoint
from quire.transfer.group import identity_of
from quire.transfer.layout import BlockLayout, Shard
from quire.transfer.negotiate import Identity, Peer
from quire.transfer.state import Commit, Delivered, Ended, Failure, Released, TransferRef

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.engine.parallel.calls import Calls
    from quire.engine.parallel.duties import OwnHost
    from quire.engine.runner.backend import Backend
    from quire.transfer.group import Leg
    from quire.transfer.state import Event


class GangRanks:
    """The endpoints of the other ranks, for rank 0's. See `quire.transfer.group.Ranks`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def start(
        self, config: TransferConfig, identity: Identity, on_event: Callable[[int, Event], None]
    ) -> tuple[Peer, ...]:
        """Have every rank listen; how each is reached. Raises OSError when one cannot."""
        self._calls.on_event = lambda rank, message: on_event(rank, _event(message))
        asked = [
            self._calls.ask(
                rank,
                "start",
                config=to_mapping(config),
                identity=asdict(identity_of(identity, rank)),
            )
            for rank in range(1, identity.shard.degree)
        ]
        return tuple(_peer(answer.result(START_TIMEOUT_S)) for answer in asked)

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
        self._calls.ask(leg[0], "fence", ref=leg[1], timeout_s=timeout_s).result(timeout_s)

    def _tell(self, leg: Leg, verb: str, *args: object) -> None:
        self._calls.tell(leg[0], verb, ref=leg[1], args=args)


class RankEndpoint:
    """A rank's endpoint, led by rank 0; see `duties` for the arguments."""

    def __init__(
        self, backend: Backend, answer: Callable[[bytes], None], own_host: OwnHost | None = None
    ) -> None:
        self._backend, self._answer, self._own_host = backend, answer, own_host
        self._endpoint: Endpoint | None = None

    def obey(self, message: dict[str, Any]) -> None:
        """Carry out one verb. Raises ValueError for what is none."""
        verb = message["verb"]
        if verb == "start":
            start = partial(self._start, message["config"], message["identity"])
            self._answer(answer_to(message["call"], start))
            return
        ref = TransferRef(*message["ref"])
        if self._endpoint is None:
            raise ValueError(f"{verb} before start")
        if verb == "fence":
            fence = partial(self._endpoint.fence, ref, message["timeout_s"])
            self._answer(answer_to(message["call"], fence))
        else:
            _carry_out(self._endpoint, verb, ref, message["args"])

    def _start(self, config: dict[str, Any], identity: dict[str, Any]) -> str:
        layout, shard = BlockLayout(**identity["layout"]), Shard(**identity["shard"])
        options = config_of(from_mapping(TransferConfig, config), shard.rank, self._own_host)
        self._endpoint = Endpoint(
            options,
            Identity(**identity | {"layout": layout, "shard": shard}),
            self._backend.kv_memory(options.kv_staging_bytes),
            self._tell,
        )
        return self._endpoint.start().to_proto().SerializeToString().hex()

    def _tell(self, event: Event) -> None:
        self._answer(json.dumps({"ref": event.ref, "event": _words(event)}).encode())


def config_of(config: TransferConfig, rank: int, own_host: OwnHost | None) -> TransferConfig:
    """The options of one rank, from rank 0's: fixed ports count up, on another host the address is
    that host's."""
    listens, known_as = config.kv_host, config.kv_advertised_host
    if own_host is not None:
        listens = config.kv_host if config.kv_host in ANY_HOST else own_host.address
        known_as = own_host.known_as
    return replace(
        config,
        kv_host=listens,
        kv_advertised_host=known_as,
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
