"""What went to and came from each peer: for metrics, and for whoever estimates a transfer's time.

The sender measures: it alone knows when something was on its way. Its rate travels with each
commit, so that the receiver can say how fast blocks reach it and from whom.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Way = Literal["sent", "received"]

MAX_FLOWS = 1024
"""Peers are pods, and pods come and go: those beyond it are counted together."""
MAX_RATES = 256
OTHERS, UNKNOWN, NONE = "others", "unknown", "none"
"""Labels: a peer too many, one that never showed up, and no transport that led there."""
MEMORY_BYTES = 256 << 20
"""A rate looks back over this much."""
MIN_RATE_BYTES = 1 << 20
"""Less than this says more about latency than about speed."""
SUCCESS = "committed"


class FlowKey(NamedTuple):
    """Which blocks are counted together."""

    way: Way
    peer: str
    """Stable name of the pod."""
    transport: str


@dataclass
class Flow:
    """Written on the endpoint's thread, read anywhere; each number only grows, but for the rate."""

    num_bytes: int = 0
    """Sent: those sent again included. Received: verified ones only."""
    blocks: int = 0
    """Of committed transfers."""
    busy_s: float = 0.0
    """Time with something on its way and not acknowledged; of what is sent only."""
    exposed_s: float = 0.0
    """Time from commit to confirmation: what of a transfer its prefill did not hide; sent only."""
    damaged_pieces: int = 0
    """Received: checksum failures. Sent: pieces asked for again."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Transfers by `Failure`, or SUCCESS."""
    _rate_bytes: float = 0.0
    _rate_s: float = 0.0

    def busy(self, seconds: float) -> None:
        """Something was on its way for so long."""
        self.busy_s += seconds
        self._rate_s += seconds

    def acknowledged(self, num_bytes: int) -> None:
        """So much of it arrived."""
        self._rate_bytes += num_bytes
        if self._rate_bytes > MEMORY_BYTES:
            self._rate_bytes /= 2
            self._rate_s /= 2

    @property
    def bytes_per_s(self) -> float:
        """Moving average while something is on its way; 0 until enough was."""
        if self._rate_bytes < MIN_RATE_BYTES or self._rate_s <= 0:
            return 0.0
        return self._rate_bytes / self._rate_s


class Flows:
    """Every flow of an endpoint."""

    def __init__(self) -> None:
        self._flows: dict[FlowKey, Flow] = {}
        self._rates: OrderedDict[str, float] = OrderedDict()

    def of(self, way: Way, peer: str, transport: str) -> Flow:
        """The counts for a peer, made when new."""
        key = FlowKey(way, peer or UNKNOWN, transport or NONE)
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                key = key._replace(peer=OTHERS)
            flow = self._flows.setdefault(key, Flow())
        return flow

    def items(self) -> list[tuple[FlowKey, Flow]]:
        """All of them, at this moment. Any thread."""
        return list(self._flows.items())

    def note_rate(self, peer: str, bytes_per_s: float) -> None:
        """A peer said how fast its blocks reach this process; 0 when it does not know yet."""
        if bytes_per_s > 0:
            self._rates[peer] = bytes_per_s
            self._rates.move_to_end(peer)
            if len(self._rates) > MAX_RATES:
                self._rates.popitem(last=False)

    def receive_rates(self) -> dict[str, float]:
        """Peer -> bytes per second of what it sends here, the latest word of each. Any thread."""
        return dict(self._rates)
