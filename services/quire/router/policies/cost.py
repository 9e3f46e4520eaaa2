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
    from numpy.typing import NDArray

    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints, Flags, Floats
    from quire.router.query import RouteQuery

CANDIDATES = 4
"""Pods of each kind that are compared in pairs, chosen by what the other one does not change."""


@dataclass(frozen=True)
class ExpectedCost:
    """Seconds, for each pod as decode pod, with the cheapest way to prefill for it."""

    prices: c.Prices
    min_tokens: int
    """Uncached prompt tokens below which only local prefill counts."""
    name: str = "cost_s"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """min(local, best remote) + decode + memory, scaled by the role."""
        others = c.decode_cost(query, pods, self.prices) + c.memory_wait(query, pods)
        prefill = local_cost(query, pods, self.prices)
        decodes = self._remote_decodes(query, pods, others)
        prefills = prefill_candidates(query, pods, decodes, self.prices)
        if prefills:
            remote = remote_costs(query, pods, (prefills, decodes.tolist()), self.prices)
            asks = c.uncached(query, pods) >= self.min_tokens
            prefill[asks] = c.in_role(prefill, pods)[asks]
            prefill[decodes] = np.minimum(prefill[decodes], remote.min(axis=0))
        total: Floats = (prefill + others) / np.maximum(pods.decode_weight, c.MIN_WEIGHT)
        return total

    def _remote_decodes(
        self, query: RouteQuery, pods: Endpoints, others: Floats
    ) -> NDArray[np.int64]:
        """Decode pods that are cheapest when another pod prefills."""
        sent = c.uncached(query, pods)
        transfer = sent * pods.bytes_per_token / pods.receive_bytes_per_s
        may = pods.serving & (pods.decode_weight > 0) & ~pods.suspect & (sent >= self.min_tokens)
        return c.cheapest(others + transfer + c.seat_wait(query, pods), may, CANDIDATES)


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
        prefills = prefill_candidates(query, pods, np.array([decode]), self.prices)
        if not prefills:
            return None
        remote = remote_costs(query, pods, (prefills, [decode]), self.prices)[:, 0]
        itself = pods.at(np.array([decode]))
        local = c.in_role(local_cost(query, itself, self.prices), itself)[0]
        best = int(remote.argmin())
        return prefills[best] if remote[best] < local else None


def local_cost(query: RouteQuery, pods: Endpoints, prices: c.Prices) -> Floats:
    """Prefilling on the decode pod itself."""
    return c.local_ttft(query, pods) + c.prefill_harm(query, pods, prices)


def remote_costs(
    query: RouteQuery, pods: Endpoints, pairs: tuple[list[int], list[int]], prices: c.Prices
) -> Floats:
    """Prefilling on another pod, for every pair of (prefill slots, decode slots)."""
    prefills, decodes = pairs
    few = pods.at(np.array([*decodes, *prefills]))
    scaled = c.prefill_cost(query, few, prices)
    plain = few.wait_s + c.uncached(query, few) / few.prefill_tokens_per_s
    costs = np.empty((len(prefills), len(decodes)))
    for row, slot in enumerate(prefills):
        at = len(decodes) + row
        ttft = c.remote_ttft(query, few, at, prices)[: len(decodes)]
        costs[row] = ttft + scaled[at] - plain[at]  # its harm and role, its time is in the first
        costs[row, [d == slot for d in decodes]] = np.inf  # to itself it would be local
        costs[row, few.kv_layout[: len(decodes)] != few.kv_layout[at]] = np.inf
    return costs


def prefill_candidates(
    query: RouteQuery, pods: Endpoints, decodes: NDArray[np.int64], prices: c.Prices
) -> list[int]:
    """The cheapest pods to prefill the query for one of `decodes`."""
    kept: Flags = np.isin(pods.kv_layout, pods.kv_layout[decodes])
    for f in PREFILL_FILTERS:
        kept = f.keep(query, pods, kept)
    slots = c.cheapest(c.prefill_cost(query, pods, prices), kept, CANDIDATES)
    return [int(slot) for slot in slots]


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
