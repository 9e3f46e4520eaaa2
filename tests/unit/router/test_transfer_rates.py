"""What pods measure of transfers between them changes where prompts are prefilled."""

from __future__ import annotations

import pytest
from routing import add_pod, make_query, make_router

from quire.proto import worker_pb2
from quire.router import convert
from quire.router.cost import Prices, remote_ttft

QUERY = make_query(*range(64))


def pair():
    """A pod for prefill alone, and one that decodes and has 20 s of prompts before it."""
    router = make_router(0)
    add_pod(router, "p", decode_weight=0.0)
    add_pod(router, "d", waiting_tokens=20_000)
    return router


def measured(router, bytes_per_s: float, peer: str = "p") -> None:
    """The decode pod's next load, as it comes over the wire."""
    load = worker_pb2.Load(
        queued_tokens=20_000, blocks_free=1 << 20, prefill_tokens_per_s=1000.0, itl_s=0.02,
        itl_slope_s=0.0005,
    )  # fmt: skip
    load.transfer_rates.add(peer=peer, bytes_per_s=bytes_per_s)
    read = convert.load_from(worker_pb2.Load.FromString(load.SerializeToString()))
    router.fleet.report("d", read, router.clock())


def remote_s(router) -> float:
    """Expected time to first token on the decode pod when the other prefills."""
    pods = router.fleet.endpoints(QUERY, router.clock())
    slots = {name: slot for slot, name in enumerate(pods.pods) if name}
    return float(remote_ttft(QUERY, pods, slots["p"], Prices())[slots["d"]])


def test_a_slow_pair_is_dearer_by_its_measured_rate():
    router = pair()
    prior = remote_s(router)
    measured(router, 1e9)
    assert remote_s(router) == pytest.approx(prior), "the prior is 1 GB/s"
    num_bytes = 64 * (2 << 20)
    measured(router, 1e7)
    # the second of prefill hides no more than a second of it, but for the last chunk
    assert remote_s(router) - prior > num_bytes / 1e7 - 1.0
    measured(router, 1e10)
    assert remote_s(router) < prior


def test_a_prompt_is_computed_elsewhere_only_while_the_way_is_fast_enough():
    router = pair()
    assert router.route(QUERY).prefill_pod == "p"
    router = pair()
    measured(router, 1e6)
    decision = router.route(QUERY)
    assert (decision.decode_pod, decision.prefill_pod) == ("d", None)


def test_a_rate_of_a_pod_that_is_not_there_is_kept_for_when_it_comes():
    router = make_router(0)
    add_pod(router, "d", waiting_tokens=20_000)
    measured(router, 1e6)
    add_pod(router, "p", decode_weight=0.0)
    assert router.route(QUERY).prefill_pod is None
