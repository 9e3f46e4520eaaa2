"""KV transfer verbs to the other ranks of a gang, over gangs that answer as they are told."""

from __future__ import annotations

import json

import pytest
from transfers import LAYOUT, config

from quire.engine.parallel.calls import Calls
from quire.engine.parallel.kv import GangRanks
from quire.transfer.layout import Shard
from quire.transfer.negotiate import Identity, Peer
from quire.transfer.state import Ended, Failure, TransferRef

REF = TransferRef(1, 1, 12)
IDENTITY = Identity(LAYOUT, Shard(0, 3), "pod", 11, 1.0)


class Gang:
    """Ranks that answer a call within `tell`: on another thread they may be as fast."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.told: list[tuple[int, dict]] = []
        self.calls = Calls(self.tell)

    def tell(self, rank: int, payload: bytes) -> None:
        message = json.loads(payload)
        self.told.append((rank, message))
        if "call" in message:
            peer = Peer("pod", 11 + rank, Shard(rank, 3), (("tcp", f"here:{rank}"),))
            answer = {"call": message["call"]}
            if self.error is not None:
                answer["error"] = self.error
            elif message["verb"] == "start":
                answer["result"] = peer.to_proto().SerializeToString().hex()
            else:
                answer["result"] = None
            self.calls.hear(rank, json.dumps(answer).encode())


@pytest.fixture
def gang() -> Gang:
    return Gang()


def started(gang: Gang) -> tuple[GangRanks, list]:
    ranks, events = GangRanks(gang.calls), []
    peers = ranks.start(config(), IDENTITY, lambda rank, event: events.append((rank, event)))
    assert [peer.listeners for peer in peers] == [(("tcp", "here:1"),), (("tcp", "here:2"),)]
    return ranks, events


def test_an_answer_that_comes_before_the_call_has_returned(gang) -> None:
    ranks, _ = started(gang)
    ranks.fence((1, REF), 1.0)
    assert gang.told[-1][1]["verb"] == "fence"
    assert not gang.calls._open


def test_a_rank_that_cannot_is_an_error_here(gang) -> None:
    ranks, _ = started(gang)
    gang.error = "no room"
    with pytest.raises(OSError, match="no room"):
        ranks.fence((2, REF), 1.0)


def test_events_come_with_their_rank(gang) -> None:
    _, events = started(gang)
    gang.calls.hear(2, json.dumps({"ref": REF, "event": ["ended", "lost", "gone", None]}).encode())
    assert events == [(2, Ended(REF, Failure.LOST, "gone"))]
