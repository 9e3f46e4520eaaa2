"""`cost`: the pod where the first token is expected soonest, other streams and memory considered.

Filters: serving, same model, not excluded; responsive and of a decode role where there are such.
Prefill: on another pod where that is expected to be cheaper than on the decode pod itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.router import cost as c
from quire.router.filters import DECODE_FILTERS, PREFILL_FILTERS
from quire.router.pickers import Lowest
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints, Flags, Floats
    from quire.router.query import RouteQuery

CANDIDATES = 4
"""Prefill pods that are compared in full, chosen by what the decode pod does not change."""


@dataclass(frozen=True)
class ExpectedCost:
    """Seconds, for each pod as decode pod, with the cheapest way to prefill for it."""

    prices: c.Prices
    min_tokens: int
    """Uncached prompt tokens below which only local prefill counts."""
    name: str = "cost_s"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """min(local, best remote) + decode + memory, scaled by the role."""
        prefill = local_cost(query, pods, self.prices)
        long = c.uncached(query, pods) >= self.min_tokens
        if long.any():
            for slot in prefill_candidates(query, pods, self.prices):
                remote = remote_cost(query, pods, slot, self.prices)
                prefill = np.where(long, np.minimum(prefill, remote), prefill)
        decode = c.decode_cost(query, pods, self.prices) + c.memory_wait(query, pods)
        weight = np.maximum(pods.decode_weight, c.MIN_WEIGHT)
        total: Floats = (prefill + decode) / weight
        return total


@dataclass(frozen=True)
class CheapestPrefill:
    """The pod that prefills for a decode pod at the lowest cost, itself included."""

    prices: c.Prices
    min_tokens: int

    def choose(
        self, query: RouteQuery, pods: Endpoints, decode: int, rng: np.random.Generator
    ) -> int | None:
        """The prefill pod's slot; None to prefill on the decode pod."""
        if query.prompt_len - pods.cached_tokens[decode] < self.min_tokens:
            return None
        best, least = None, float(local_cost(query, pods, self.prices)[decode])
        for slot in prefill_candidates(query, pods, self.prices):
            if slot != decode:
                cost = float(remote_cost(query, pods, slot, self.prices)[decode])
                if cost < least:
                    best, least = slot, cost
        return best


def local_cost(query: RouteQuery, pods: Endpoints, prices: c.Prices) -> Floats:
    """Prefilling on the decode pod itself."""
    return c.local_ttft(query, pods) + c.prefill_harm(query, pods, prices)


def remote_cost(query: RouteQuery, pods: Endpoints, prefill: int, prices: c.Prices) -> Floats:
    """Prefilling on `prefill` for each decode pod."""
    own = float(c.prefill_cost(query, pods.at(np.array([prefill])), prices)[0])
    harm_and_role = own - pods.wait_s[prefill] - _duration(query, pods, prefill)
    cost: Floats = c.remote_ttft(query, pods, prefill, prices) + harm_and_role
    cost[prefill] = np.inf  # to itself it would be local
    return cost


def prefill_candidates(query: RouteQuery, pods: Endpoints, prices: c.Prices) -> list[int]:
    """The cheapest pods to prefill the query, whichever pod decodes it."""
    kept: Flags = np.ones(len(pods), bool)
    for f in PREFILL_FILTERS:
        kept = f.keep(query, pods, kept)
    slots = c.cheapest(c.prefill_cost(query, pods, prices), kept, CANDIDATES)
    return [int(slot) for slot in slots]


def _duration(query: RouteQuery, pods: Endpoints, slot: int) -> float:
    missing = query.prompt_len - pods.cached_tokens[slot]
    return float(missing / pods.prefill_tokens_per_s[slot])


def prices_of(config: RouterConfig) -> c.Prices:
    """Prices from the options."""
    return c.Prices(
        work=config.work_price,
        stall=config.stall_price,
        chunk_tokens=config.prefill_chunk_tokens,
        round_trip_s=config.prefill_round_trip_s,
    )


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    prices, min_tokens = prices_of(config), config.min_remote_prefill_tokens
    scorer = ExpectedCost(prices, min_tokens)
    profile = Profile(DECODE_FILTERS, (scorer,), Lowest(tie=config.tie_s))
    return Policy("cost", profile, CheapestPrefill(prices, min_tokens))
