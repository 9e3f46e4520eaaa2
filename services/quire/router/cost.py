"""What a placement costs, in seconds. Pure functions over a snapshot; the only place with formulas.

    L   prompt tokens                       hit(X)   leading tokens that pod X holds
    d   decode pod, p prefill pod           rate(X)  prompt tokens per second, measured by the pod

    local(d)     = wait(d) + (L - hit(d)) / rate(d)
    remote(p, d) = wait(p) + (L - hit(p)) / rate(p) + exposed(p, d) + round trip
    exposed      = last chunk's transfer + what of the transfer does not fit beside the prefill

    cost(d)      = min((local + harm(d)) / role(d), remote + harm(p)) + decode(d) + memory(d)

`harm` is what a prefill takes from others on the pod that does it: the streams that decode there
and the requests that come next; `decode` is what the answer's tokens cost, the request's own and
the slowing of its neighbours; `memory` is waiting for blocks that running streams hold.

The prefill pod needs all the keys and values in front of what it computes, so its own hit counts;
the decode pod's hit saves transfer alone. The published formula with max(hit(p), hit(d)) holds only
where prefill pods can read a decode pod's blocks.

Everything is in seconds of time to first token, so that no term needs a weight to be comparable;
the two prices below say what a second of something else is worth in them. A prefix hit ranked above
load collapses onto one pod as soon as all prompts begin alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quire.router.endpoints import Endpoints, Floats
    from quire.router.query import RouteQuery

MIN_WEIGHT = 1e-3
"""Role weights below it count as it: a division."""

MIN_LOCAL_WEIGHT = 0.2
"""A pod that is not for prefill computes a prompt itself where that is five times cheaper than to
have it computed: the others' queue is long, or the link slow."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What is worth how much, and the constants of a transfer."""

    work: float = 1.0
    """A second of prefill that another pod's cache would have spared: the requests that come next
    wait for it."""
    stall: float = 0.01
    """A second by which one running stream's next tokens are late."""
    chunk_tokens: int = 512
    """Prompt tokens that a prefill pod computes, then pushes, at once."""
    round_trip_s: float = 0.002
    """Asking the prefill pod and hearing of it."""


def uncached(query: RouteQuery, pods: Endpoints) -> Floats:
    """Prompt tokens that each pod would have to compute."""
    return query.prompt_len - pods.cached_tokens


def local_ttft(query: RouteQuery, pods: Endpoints) -> Floats:
    """Expected time to the first token when the decode pod prefills."""
    return pods.wait_s + uncached(query, pods) / pods.prefill_tokens_per_s + seat_wait(query, pods)


def seat_wait(query: RouteQuery, pods: Endpoints) -> Floats:
    """Waiting for a place in a full batch: streams end one after the other."""
    excess = np.maximum(pods.running + 1 - pods.max_seqs, 0.0)
    return excess * pods.itl_s * query.expected_output / np.maximum(pods.running, 1.0)


def prefill_harm(query: RouteQuery, pods: Endpoints, prices: Prices) -> Floats:
    """What a prefill costs others: streams beside it stand still, later requests wait for it."""
    duration = uncached(query, pods) / pods.prefill_tokens_per_s
    return (prices.work + prices.stall * pods.running) * duration


def decode_cost(query: RouteQuery, pods: Endpoints, prices: Prices) -> Floats:
    """The answer's tokens: its own latency, and how much slower its neighbours get."""
    latency = pods.itl_s + pods.itl_slope_s * (pods.running + 1)
    return prices.stall * query.expected_output * latency


def memory_wait(query: RouteQuery, pods: Endpoints) -> Floats:
    """Waiting for blocks that running streams hold.

    Evicting cached blocks is free: pricing it was measured to cost more, as it draws prompts away
    from their prefixes to whichever pod has most unused blocks.
    """
    needed = (uncached(query, pods) + query.expected_output) / pods.block_size
    # the request's own cached prefix is not there to be evicted for it
    available = pods.blocks_free + pods.blocks_cached - pods.cached_tokens / pods.block_size
    missing = np.maximum(needed - available, 0.0)
    # within a stream's lifetime, all that the running streams own is given back
    owned = np.maximum(pods.num_blocks - pods.blocks_free - pods.blocks_cached, 1.0)
    wait: Floats = pods.itl_s * query.expected_output * missing / owned
    return wait


def in_role(local: Floats, pods: Endpoints) -> Floats:
    """Costs of prefilling where the answer is decoded, while another pod could: scaled by role."""
    scaled: Floats = local / np.maximum(pods.prefill_weight, MIN_LOCAL_WEIGHT)
    return scaled


def prefill_cost(query: RouteQuery, pods: Endpoints, prices: Prices) -> Floats:
    """Using each pod to prefill for another: time until done, and harm. Scaled by its role."""
    ttft = pods.wait_s + uncached(query, pods) / pods.prefill_tokens_per_s
    return (ttft + prefill_harm(query, pods, prices)) / np.maximum(pods.prefill_weight, MIN_WEIGHT)


def exposed_transfer(query: RouteQuery, pods: Endpoints, prefill: int, prices: Prices) -> Floats:
    """Transfer time from one prefill pod to each decode pod that its prefill does not hide."""
    sent = uncached(query, pods)
    rate = pair_rates(pods, prefill)
    last: Floats = np.minimum(sent, prices.chunk_tokens) * pods.bytes_per_token / rate
    duration = (query.prompt_len - pods.cached_tokens[prefill]) / pods.prefill_tokens_per_s[prefill]
    rest: Floats = np.maximum(sent * pods.bytes_per_token / rate - duration, 0.0)
    return last + rest


def pair_rates(pods: Endpoints, prefill: int) -> Floats:
    """Bytes per second from one pod to each other one."""
    rates = pods.receive_bytes_per_s
    if measured := pods.pair_bytes_per_s.get(prefill):
        rates = rates.copy()
        rates[list(measured)] = list(measured.values())
    return rates


def remote_ttft(query: RouteQuery, pods: Endpoints, prefill: int, prices: Prices) -> Floats:
    """Expected time to the first token on each decode pod when `prefill` prefills."""
    # the decode pod's own queue is not waited for: its running batch takes the request in
    busy = (query.prompt_len - pods.cached_tokens[prefill]) / pods.prefill_tokens_per_s[prefill]
    ttft = pods.wait_s[prefill] + busy + exposed_transfer(query, pods, prefill, prices)
    total: Floats = ttft + prices.round_trip_s + seat_wait(query, pods)
    return total


def cheapest(costs: Floats, candidates: NDArray[np.bool], count: int) -> NDArray[np.int64]:
    """Up to `count` candidate slots with the lowest costs, in no order."""
    (slots,) = np.nonzero(candidates)
    if len(slots) <= count:
        return slots
    return slots[np.argpartition(costs[slots], count)[:count]]
