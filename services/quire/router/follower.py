"""Follows one pod's numbered cache events. No I/O: frames in, index updates out, or `OutOfSync`.

    no number yet --snapshot, all parts--> at number n --events n+1..m--> at number m --> ...
                                            digest of number m: equal, or OutOfSync
    any gap, another incarnation, or a delta before the snapshot: OutOfSync

Out of sync, the pod is asked for a snapshot; until that is complete the old content stays in use,
trusted half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.api.block_hash import HASH_BYTES
from quire.proto import worker_pb2

if TYPE_CHECKING:
    from quire.router.fleet import Fleet, Pod

_STORED = worker_pb2.CacheEvent.KIND_STORED
_REMOVED = worker_pb2.CacheEvent.KIND_REMOVED
_CLEARED = worker_pb2.CacheEvent.KIND_CLEARED


class OutOfSync(Exception):
    """The pod's cache has to be asked for again. The reason is a label: gap, digest or drift."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Follower:
    """How far one incarnation of a pod has been followed."""

    def __init__(self, fleet: Fleet, pod: Pod) -> None:
        self.pod = pod
        self.sequence: int | None = None
        """Number of the last event taken in; None before the first snapshot is complete."""
        self._fleet = fleet
        self._parts: list[bytes] = []

    def take(self, message: worker_pb2.CacheEvents) -> None:
        """A snapshot's part, or events. Raises OutOfSync when something is missing."""
        if message.incarnation != self.pod.incarnation:
            self._lost("gap")
        elif message.snapshot:
            self._parts += [_checked(event.block_hash) for event in message.events]
            if not message.more:
                self._fleet.stored(self.pod, self._parts)
                self._parts, self.sequence = [], message.first_sequence
        elif self._parts or self.sequence is None or message.first_sequence != self.sequence + 1:
            self._lost("gap")
        else:
            self._apply(message)
            self.sequence += len(message.events)

    def check(self, digest: worker_pb2.CacheDigest) -> bool:
        """Compare contents; False when the digest is of another moment. Raises OutOfSync."""
        if digest.incarnation != self.pod.incarnation or digest.sequence != self.sequence:
            return False
        index, slot = self._fleet.index, self.pod.slot
        same = (index.count(slot), index.hash_xor(slot)) == (digest.count, digest.hash_xor)
        if not same:
            self._lost("digest")
        return True

    def check_trust(self) -> None:
        """Raises OutOfSync when requests found much less in the cache than the index says."""
        if self.pod.resync:
            self._lost("drift")

    def _apply(self, message: worker_pb2.CacheEvents) -> None:
        index, slot = self._fleet.index, self.pod.slot
        for event in message.events:
            if event.kind == _STORED:
                index.store(slot, _checked(event.block_hash))
            elif event.kind == _REMOVED:
                index.remove(slot, _checked(event.block_hash))
            elif event.kind == _CLEARED:
                index.clear(slot)
            # a kind of a later version: the digest tells whether it mattered

    def _lost(self, reason: str) -> None:
        self._fleet.distrust(self.pod)
        self.sequence, self._parts = None, []
        raise OutOfSync(reason)


def _checked(block_hash: bytes) -> bytes:
    if len(block_hash) != HASH_BYTES:
        raise ValueError(f"a block hash has {HASH_BYTES} bytes, not {len(block_hash)}")
    return block_hash
