"""KV blocks exchanged with other workers; peers are workers, by their stable names."""

from __future__ import annotations

from quire.telemetry.instruments import CounterDeclaration, GaugeDeclaration

KV_TRANSFERS = CounterDeclaration(
    name="quire_kv_transfers", unit="transfers", component="engine",
    help="KV transfers that ended. Outcome: committed, or why not: cancelled, peer_cancelled, "
    "lease (nothing heard or moved in time), lost, checksum, incomplete, fenced, incompatible, "
    "unreachable, protocol. Peer unknown: none showed up; transport none: none led there.",
    labels=("direction", "peer", "transport", "outcome"),
)  # fmt: skip
KV_TRANSFER_BYTES = CounterDeclaration(
    name="quire_kv_transfer_bytes", unit="bytes", component="engine",
    help="Bytes of KV blocks sent, repetitions included, and received, verified ones only.",
    labels=("direction", "peer", "transport"),
)  # fmt: skip
KV_TRANSFER_BLOCKS = CounterDeclaration(
    name="quire_kv_transfer_blocks", unit="blocks", component="engine",
    help="KV blocks of committed transfers.",
    labels=("direction", "peer", "transport"),
)  # fmt: skip
KV_TRANSFER_BUSY = CounterDeclaration(
    name="quire_kv_transfer_busy_seconds", unit="seconds", component="engine",
    help="Time with bytes sent to the peer and not acknowledged: bytes sent over it are the speed.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_TRANSFER_EXPOSED = CounterDeclaration(
    name="quire_kv_transfer_exposed_seconds", unit="seconds", component="engine",
    help="Time from the end of a prompt to the peer's confirmation of its last block: what of "
    "transfers to it the prefill did not hide.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_DAMAGED_PIECES = CounterDeclaration(
    name="quire_kv_damaged_pieces", unit="pieces", component="engine",
    help="Parts of blocks that arrived with a wrong checksum; each is asked for again once.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_REPEATED_PIECES = CounterDeclaration(
    name="quire_kv_repeated_pieces", unit="pieces", component="engine",
    help="Parts of blocks that the peer asked for again.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_RECEIVE_RATE = GaugeDeclaration(
    name="quire_kv_receive_bytes_per_second", unit="bytes/s", component="engine",
    help="Speed at which the peer's blocks reach this worker, as it measured: what routers use.",
    labels=("peer",),
)  # fmt: skip
KV_LINKS = CounterDeclaration(
    name="quire_kv_links", unit="links", component="engine",
    help="Connections for KV blocks that were made, probes included.",
    labels=("transport",),
)  # fmt: skip
KV_REFUSED_LINKS = CounterDeclaration(
    name="quire_kv_refused_links", unit="links", component="engine",
    help="Connections that were refused: the token was not proved, another layout or version.",
)  # fmt: skip
KV_FENCED_FRAMES = CounterDeclaration(
    name="quire_kv_fenced_frames", unit="frames", component="engine",
    help="Frames thrown away unread: of transfers that are over, or of another process.",
)  # fmt: skip
KV_QUARANTINED_BYTES = GaugeDeclaration(
    name="quire_kv_quarantined_bytes", unit="bytes", component="engine",
    help="Landing memory that a lost peer's one-sided writes may still reach, not used again.",
)  # fmt: skip
