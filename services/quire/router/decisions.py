"""Decisions, and the latest of them kept so that each can be explained."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.router.endpoints import Endpoint, Endpoints, Flags, Floats
    from quire.router.query import RouteQuery


@dataclass(frozen=True)
class PodScore:
    """One pod as it was when the decision was made, and what it would have cost."""

    endpoint: Endpoint
    eligible: bool
    """It passed the policy's filters."""
    costs: tuple[tuple[str, float], ...]
    """(scorer, cost), the deciding one first."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where a request goes."""

    decision_id: str
    policy: str
    decode_pod: str
    prefill_pod: str | None
    """None: the decode pod prefills."""
    decode_cached_tokens: int
    """Leading prompt tokens the decode pod is expected to have."""
    decode_cached_blocks: int
    """The same in the pod's blocks."""
    prefill_cached_tokens: int
    """Likewise of the prefill pod; 0 without one."""
    prefill_cached_blocks: int
    expected_ttft_s: float
    """Until the first token, by the router's estimate."""
    late: bool = False
    """The first token is not expected before the query's deadline."""

    @property
    def expected_cached_tokens(self) -> int:
        """Prompt tokens expected to be cached where the prompt is prefilled."""
        return self.decode_cached_tokens if self.prefill_pod is None else self.prefill_cached_tokens


@dataclass(frozen=True)
class Explanation:
    """A decision with what it was made from."""

    decision: Decision
    query: RouteQuery
    """Without its hashes, which would take a hundred times the rest."""
    num_pods: int
    """Pods that the router knew."""
    pods: Endpoints
    """Of a large fleet the cheapest ones only; the chosen ones always."""
    eligible: Flags
    scorers: tuple[str, ...]
    costs: tuple[Floats, ...]
    """Per scorer, for `pods`."""

    def scores(self) -> list[PodScore]:
        """Eligible pods first, the cheapest in front."""
        scores = []
        for slot in range(len(self.pods)):
            values = [float(costs[slot]) for costs in self.costs]
            named = tuple(zip(self.scorers, values, strict=True))
            scores.append(PodScore(self.pods[slot], bool(self.eligible[slot]), named))
        return sorted(scores, key=lambda s: (not s.eligible, [cost for _, cost in s.costs]))


class DecisionRing:
    """The latest explanations by decision id; the oldest make way."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[str, Explanation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, explanation: Explanation) -> None:
        """Keep it, in place of the oldest when there is no room."""
        if len(self._kept) >= self._capacity:
            self._kept.popitem(last=False)
        self._kept[explanation.decision.decision_id] = explanation

    def get(self, decision_id: str) -> Explanation | None:
        """The explanation, or None when it is no longer kept."""
        return self._kept.get(decision_id)

    def of_request(self, request_id: str) -> list[Explanation]:
        """All that is kept of a request, the newest last."""
        return [e for e in self._kept.values() if e.query.request_id == request_id]
