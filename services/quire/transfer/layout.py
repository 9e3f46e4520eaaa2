"""Which bytes of a block go from which rank to which rank. Pure arithmetic, no I/O.

A block is one contiguous span per rank, KV head outermost (`quire.kernels.layout`):

    block of one rank   [kv_head][layer][2][tile]      head_bytes = layers * 2 * tile bytes
    heads of a rank     consecutive                    so any two ranks share one contiguous span

    TP 2 -> TP 4, 8 heads     source rank 0: heads 0..3     destination rank 1: heads 2..3
                              span: source offset 2 heads, destination offset 0, length 2 heads

With more ranks than KV heads each head is replicated; only the lowest source rank that holds it
sends it, and every destination rank gets its own copy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.kernels.layout import DTYPE_BYTES

if TYPE_CHECKING:
    from quire.kernels.layout import KvLayout

WIRE_VERSION = 1
"""Version of the frames and of the block's order in memory. Raised when either changes."""

FRAME_BYTES = 1 << 20
"""Most payload of one frame, where a channel does not say otherwise; over gRPC half as much costs
half as much CPU time again."""

PIECE_BYTES = 256 << 10
"""Largest part of a block with a checksum of its own: small enough to be in cache still when it is
summed, which 1 MiB is not."""


@dataclass(frozen=True)
class BlockLayout:
    """What two pods must agree on to exchange blocks. TP degrees may differ: see `share`."""

    model: str
    """Identity of the weights (the engine's model fingerprint): equal shapes are not enough."""
    dtype: str
    """A torch dtype name from `quire.kernels.layout.DTYPE_BYTES`."""
    block_size: int
    """Tokens in a block."""
    num_layers: int
    num_kv_heads: int
    """Over all ranks, without replicas."""
    head_dim: int
    order: str = "plain"
    """Inner order of a tile, a `KvOrder` value."""
    quantization: str = "none"
    numerics: str = "any"
    """What decides the bits of the content (`quire.kernels.numerics`), but for the TP degree."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype must be one of {sorted(DTYPE_BYTES)}, not {self.dtype!r}")
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def of(
        cls, layout: KvLayout, *, model: str, numerics: str, num_kv_heads: int | None = None
    ) -> BlockLayout:
        """From one rank's pool layout; `num_kv_heads` is the model's when the rank holds fewer."""
        return cls(
            model=model,
            dtype=layout.dtype,
            block_size=layout.block_size,
            num_layers=layout.num_layers,
            num_kv_heads=num_kv_heads or layout.num_kv_heads,
            head_dim=layout.head_dim,
            order=str(layout.order),
            numerics=numerics,
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head of one block, over all layers."""
        return self.num_layers * 2 * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    def describe(self) -> str:
        """One line naming every part of the fingerprint."""
        return (
            f"wire={WIRE_VERSION} model={self.model} dtype={self.dtype} "
            f"block_size={self.block_size} layers={self.num_layers} kv_heads={self.num_kv_heads} "
            f"head_dim={self.head_dim} order={self.order} quantization={self.quantization} "
            f"numerics={self.numerics}"
        )

    def fingerprint(self) -> bytes:
        """16 bytes, equal exactly when blocks can be exchanged; stable over versions."""
        return hashlib.blake2b(self.describe().encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Shard:
    """One rank of a tensor-parallel group."""

    rank: int = 0
    degree: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.degree:
            raise ValueError(f"rank {self.rank} is outside a group of {self.degree}")


@dataclass(frozen=True)
class Span:
    """A run of bytes: where in the sender's block, where in the receiver's, how long."""

    source: int
    destination: int
    length: int


def heads_of(num_kv_heads: int, shard: Shard) -> range:
    """KV heads that a rank holds.

    Raises ValueError when the degree neither divides the heads nor is a multiple of them.
    """
    if num_kv_heads % shard.degree == 0:
        each = num_kv_heads // shard.degree
        return range(shard.rank * each, (shard.rank + 1) * each)
    if shard.degree % num_kv_heads == 0:
        head = shard.rank // (shard.degree // num_kv_heads)
        return range(head, head + 1)
    raise ValueError(f"{num_kv_heads} KV heads cannot be split over {shard.degree} ranks")


def block_bytes(layout: BlockLayout, shard: Shard) -> int:
    """Bytes of a block on a rank."""
    return layout.head_bytes * len(heads_of(layout.num_kv_heads, shard))


def share(layout: BlockLayout, source: Shard, destination: Shard) -> Span | None:
    """The bytes of a block that `source` sends to `destination`; None when it sends nothing.

    Over all source ranks the spans cover the destination's block exactly once. Raises ValueError
    on a degree that the heads cannot be split over.
    """
    replicas = max(source.degree // layout.num_kv_heads, 1)
    if source.rank % replicas:
        return None  # a lower rank holds the same head, and sends it
    held = heads_of(layout.num_kv_heads, source)
    wanted = heads_of(layout.num_kv_heads, destination)
    first, end = max(held.start, wanted.start), min(held.stop, wanted.stop)
    if first >= end:
        return None
    size = layout.head_bytes
    return Span((first - held.start) * size, (first - wanted.start) * size, (end - first) * size)


def sources_of(layout: BlockLayout, degree: int, destination: Shard) -> tuple[int, ...]:
    """Ranks of a sending group of `degree` that have bytes for `destination`, ascending."""
    ranks = range(degree)
    return tuple(r for r in ranks if share(layout, Shard(r, degree), destination) is not None)


def pieces(span: Span, piece_bytes: int = PIECE_BYTES) -> tuple[Span, ...]:
    """A span cut into parts that fit a frame, in order. Both sides cut alike, so a piece's number
    names its bytes."""
    return tuple(
        Span(span.source + o, span.destination + o, min(piece_bytes, span.length - o))
        for o in range(0, span.length, piece_bytes)
    )
