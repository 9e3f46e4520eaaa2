"""The router: a query in, a decision out. The same object serves in-process and behind gRPC.

    route:    endpoints now -> policy: decode pod, maybe prefill pod -> effects -> decision, kept
    observe:  what the pod really had cached -> how far its index is trusted
    explain:  a kept decision with the pods and scores it was made from

Replicas share nothing: each builds its own index from the pods, and load reports correct what it
does not know of the others' picks. Not thread-safe; one event loop, or one thread, owns it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client.registry import CollectorRegistry

from quire.api.errors import ApiError
from quire.router import cost as c
from quire.router.decisions import Decision, DecisionRing, Explanation
from quire.router.fleet import Fleet
from quire.router.metrics import DecisionMetrics
from quire.router.policies import build_policy
from quire.router.policies.cost import prices_of
from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints
    from quire.router.profile import Choice
    from quire.router.query import RouteQuery
    from quire.telemetry.instruments import Instruments

EXPLAINED_PODS = 32
"""Pods kept with a decision: all of a small fleet, the cheapest of a large one."""
RETRY_AFTER_S = 1.0


class Router:
    """Chooses pods for queries, from what its fleet knows."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        instruments: Instruments | None = None,
    ) -> None:
        self.config = config
        self.fleet = fleet or Fleet(
            in_flight_ttl_s=config.in_flight_ttl_s, stale_after_s=config.stale_after_s
        )
        self.clock = clock
        self.decisions = DecisionRing(config.max_decisions)
        self._metrics = DecisionMetrics(instruments or m.router_instruments(CollectorRegistry()))
        self._policy = build_policy(config)
        self._prices = prices_of(config)
        self._rng = np.random.default_rng(config.routing_seed)
        # replicas' ids must differ, whatever their seeds
        self._id_prefix, self._num_decisions = secrets.token_hex(4), 0

    def route(self, query: RouteQuery) -> Decision:
        """Where the request goes; the choice counts at once.

        Raises ApiError: `not_ready` when no pod may serve it now.
        """
        now, started = self.clock(), time.perf_counter()
        pods = self.fleet.endpoints(query, now)
        choice = self._policy.decode.run(query, pods, self._rng)
        if choice is None:
            self._metrics.refused()
            raise ApiError("not_ready", self._why_none(query, pods), retry_after_s=RETRY_AFTER_S)
        prefill = self._policy.prefill.choose(query, pods, choice.slot, self._rng)
        decision = self._decide(query, pods, choice.slot, prefill)
        self._keep(decision, query, pods, choice)
        self._apply(query, pods, choice.slot, prefill, now)
        self._metrics.decided(decision, query.prompt_len, time.perf_counter() - started)
        return decision

    def observe(self, decision_id: str, actual_cached: int) -> Decision | None:
        """The request found this many prompt tokens cached on the pod that prefilled it.

        Returns the decision, or None when it is no longer kept.
        """
        explanation = self.decisions.get(decision_id)
        if explanation is None:
            return None
        decision = explanation.decision
        pod = decision.prefill_pod or decision.decode_pod
        self._metrics.observed(decision.expected_cached_tokens, actual_cached)
        self.fleet.observe(pod, decision.expected_cached_tokens, actual_cached, self.clock())
        return decision

    def explain(self, decision_id: str) -> Explanation | None:
        """A decision with its scores, or None when it is no longer kept."""
        return self.decisions.get(decision_id)

    # ---- parts of `route`

    def _decide(
        self, query: RouteQuery, pods: Endpoints, decode: int, prefill: int | None
    ) -> Decision:
        if prefill is None:
            ttft = c.local_ttft(query, pods.at(np.array([decode])))[0]
        else:
            pair = pods.at(np.array([prefill, decode]))
            ttft = c.remote_ttft(query, pair, 0, self._prices)[1]
        cached, size = pods.cached_tokens, pods.block_size
        prefill_cached = 0.0 if prefill is None else cached[prefill]
        prefill_size = size[decode if prefill is None else prefill]
        self._num_decisions += 1
        return Decision(
            decision_id=f"{self._id_prefix}-{self._num_decisions}",
            policy=self._policy.name,
            decode_pod=pods.pods[decode],
            prefill_pod=None if prefill is None else pods.pods[prefill],
            decode_cached_tokens=int(cached[decode]),
            decode_cached_blocks=int(cached[decode] / size[decode]),
            prefill_cached_tokens=int(prefill_cached),
            prefill_cached_blocks=int(prefill_cached / prefill_size),
            expected_ttft_s=float(ttft),
            late=query.deadline_s is not None and ttft > query.deadline_s,
        )

    def _apply(
        self, query: RouteQuery, pods: Endpoints, decode: int, prefill: int | None, now: float
    ) -> None:
        cached = pods.cached_tokens
        worker = decode if prefill is None else prefill
        self.fleet.place_decode(decode, query, float(cached[decode]), now)
        self.fleet.place_prefill(worker, query, float(cached[worker]), now)
        for slot in {decode, worker}:
            self.fleet.in_flight.claim(slot, query.keys, now)

    def _keep(self, decision: Decision, query: RouteQuery, pods: Endpoints, choice: Choice) -> None:
        if len(self.fleet) <= EXPLAINED_PODS:
            shown = np.array([pod.slot for pod in self.fleet.pods.values()])
        else:
            order = choice.costs[0] if choice.costs else np.zeros(len(pods))
            shown = c.cheapest(order, choice.kept, EXPLAINED_PODS - 2)
            chosen = (decision.decode_pod, decision.prefill_pod)
            extra = [self.fleet.pods[pod].slot for pod in chosen if pod is not None]
            shown = np.union1d(shown, extra)
        scorers = tuple(scorer.name for scorer in self._policy.decode.scorers)
        self.decisions.add(
            Explanation(
                decision=decision,
                query=replace(query, hashes=b""),
                num_pods=len(self.fleet),
                pods=pods.at(shown),
                eligible=choice.kept[shown],
                scorers=scorers,
                costs=tuple(costs[shown] for costs in choice.costs),
            )
        )

    def _why_none(self, query: RouteQuery, pods: Endpoints) -> str:
        serving = [p for p, up in zip(pods.pods, pods.serving.tolist(), strict=True) if up]
        if not serving:
            return "No pod is ready."
        if query.model and query.model not in pods.model_names:
            return f"No pod serves the model {query.model!r}."
        if query.exclude.issuperset(serving):
            return "Every pod that is ready has failed this request."
        return "No pod that may serve this request is ready."
