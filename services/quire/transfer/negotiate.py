"""Who a process is, whether two can exchange blocks, and proof of the cluster's token.

    dialler   -> Hello{nonce a}                      acceptor
              <- Hello{nonce b, proof}               or a refusal
              -> proof
              <- welcome                             or a refusal

See `quire.cluster.proof`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.cluster.proof import NONCE_BYTES, prove, proves
from quire.proto import transfer_pb2
from quire.transfer.layout import WIRE_VERSION, BlockLayout, Shard, share
from quire.transfer.state import TransferRef

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Peer:
    """How a rank of another process is reached. What travels with a request."""

    worker: str
    """Stable name of the pod."""
    incarnation: int
    """Random at process start."""
    shard: Shard
    listeners: tuple[tuple[str, str], ...]
    """(transport, address), in no order."""
    others: tuple[Peer, ...] = ()
    """The other ranks of the same worker, by rank; of rank 0 alone."""

    def to_proto(self) -> transfer_pb2.KvPeer:
        """As a message."""
        return transfer_pb2.KvPeer(
            worker=self.worker,
            incarnation=self.incarnation,
            rank=self.shard.rank,
            degree=self.shard.degree,
            listeners=_listeners(self.listeners),
            others=[other.to_proto() for other in self.others],
        )

    @classmethod
    def from_proto(cls, message: transfer_pb2.KvPeer) -> Peer:
        """Raises ValueError on a rank outside its group."""
        listeners = tuple((x.transport, x.address) for x in message.listeners)
        shard = Shard(message.rank, max(message.degree, 1))
        others = tuple(cls.from_proto(other) for other in message.others)
        return cls(message.worker, message.incarnation, shard, listeners, others)


def ref_to_proto(ref: TransferRef) -> transfer_pb2.KvTransferRef:
    """A transfer's name as a message."""
    return transfer_pb2.KvTransferRef(
        transfer=ref.transfer, epoch=ref.epoch, incarnation=ref.incarnation
    )


def ref_from_proto(message: transfer_pb2.KvTransferRef) -> TransferRef:
    """A transfer's name from a message."""
    return TransferRef(message.transfer, message.epoch, message.incarnation)


@dataclass(frozen=True)
class Identity:
    """What this process says of itself."""

    layout: BlockLayout
    shard: Shard
    worker: str
    incarnation: int
    heartbeat_s: float
    token: str = ""

    def hello(
        self, listeners: Sequence[tuple[str, str]], capabilities: Sequence[str]
    ) -> transfer_pb2.Hello:
        """A fresh greeting, without proof."""
        return transfer_pb2.Hello(
            wire_version=WIRE_VERSION,
            fingerprint=self.layout.fingerprint(),
            layout=self.layout.describe(),
            worker=self.worker,
            incarnation=self.incarnation,
            rank=self.shard.rank,
            degree=self.shard.degree,
            heartbeat_ms=int(self.heartbeat_s * 1000),
            capabilities=capabilities,
            listeners=_listeners(listeners),
            nonce=secrets.token_bytes(NONCE_BYTES),
            tells_offers=True,
        )

    def prove(self, role: str, dialler: bytes, acceptor: bytes) -> bytes:
        """That the side in this role knows the token: over both sides' nonces."""
        return prove(self.token, role, dialler, acceptor)

    def accepts(self, proof: bytes, role: str, dialler: bytes, acceptor: bytes) -> bool:
        """The proof of the side in this role holds. Takes the same time whatever differs."""
        return proves(proof, self.token, role, (dialler, acceptor))


@dataclass(frozen=True)
class Incompatible:
    """The two cannot exchange blocks; the caller prefills locally."""

    reason: str


def compatibility(mine: Identity, theirs: transfer_pb2.Hello) -> Incompatible | None:
    """None when blocks can be exchanged with the process that said `theirs`."""
    if theirs.wire_version != WIRE_VERSION:
        return Incompatible(f"wire version {theirs.wire_version}, here {WIRE_VERSION}")
    if theirs.fingerprint != mine.layout.fingerprint():
        differing = ", ".join(differences(theirs.layout, mine.layout.describe()))
        return Incompatible(f"other KV layout: {differing or 'fingerprints differ'}")
    try:
        share(mine.layout, mine.shard, Shard(theirs.rank, max(theirs.degree, 1)))
        share(mine.layout, Shard(theirs.rank, max(theirs.degree, 1)), mine.shard)
    except ValueError as error:
        return Incompatible(str(error))
    return None


def differences(theirs: str, ours: str) -> list[str]:
    """Where two `BlockLayout.describe()` differ, in words."""
    pairs = zip(theirs.split(), ours.split(), strict=False)
    return [f"{other} here {mine}" for other, mine in pairs if other != mine]


def choose(
    preferred: Sequence[str], offered: Sequence[tuple[str, str]], rates: Mapping[str, float]
) -> list[tuple[str, str]]:
    """(transport, address) to try, in order: measured ones by rate, then by preference.

    `rates`: bytes per second that probes to this peer gave. A transport measured to be slower than
    one not measured yet still comes after the preferred ones that nobody measured.
    """
    usable = [(t, a) for t, a in offered if t in preferred]
    if len(rates.keys() & {t for t, _ in usable}) < 2:
        return sorted(usable, key=lambda item: preferred.index(item[0]))
    return sorted(usable, key=lambda item: (-rates.get(item[0], 0.0), preferred.index(item[0])))


def _listeners(pairs: Sequence[tuple[str, str]]) -> list[transfer_pb2.Listener]:
    return [transfer_pb2.Listener(transport=t, address=a) for t, a in pairs]
