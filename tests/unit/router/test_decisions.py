"""Decisions as tables: which pod is chosen, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing import Clock, add_pod, cache, make_query, make_router, report

from quire.api.errors import ApiError
from quire.config.router import POLICY_NAMES, RouterConfig
from quire.router import cost as c
from quire.router.endpoints import Endpoint, Endpoints
from quire.router.policies import build_policy
from quire.router.query import RouteQuery
from quire.router.reports import PodModel

SLOW_LINK = 1e6
FAST_LINK = 1e11
QUERY = RouteQuery(hashes=b"", prompt_len=8001, expected_output=100)


def pod(name: str, **fields: Any) -> Endpoint:
    return Endpoint(**{"pod": name, "prefill_tokens_per_s": 1000.0} | fields)


def placed(pods: list[Endpoint], query: RouteQuery = QUERY, **options: Any) -> tuple[str, Any]:
    """(decode pod, prefill pod or None)."""
    policy = build_policy(RouterConfig(**options))
    columns, rng = Endpoints.of(pods), np.random.default_rng(0)
    choice = policy.decode.run(query, columns, rng)
    assert choice is not None
    prefill = policy.prefill.choose(query, columns, choice.slot, rng)
    return pods[choice.slot].pod, None if prefill is None else pods[prefill].pod


LOCAL = {"prefill_weight": 0.0}  # not asked to prefill for others: only local prefill is compared

COST_CASES = {
    "the pod that holds the prompt: nothing to compute": (
        [pod("a", **LOCAL), pod("b", cached_tokens=8000, **LOCAL)],
        ("b", None),
    ),
    "the idle pod: waiting takes longer than computing again": (
        [pod("a", **LOCAL), pod("b", cached_tokens=4000, wait_s=30.0, **LOCAL)],
        ("a", None),
    ),
    "the pod with the prefix: its queue is shorter than computing again": (
        [pod("a", **LOCAL), pod("b", cached_tokens=4000, wait_s=3.0, **LOCAL)],
        ("b", None),
    ),
    "the faster pod: both are idle and empty": (
        [pod("a", prefill_tokens_per_s=1000.0, **LOCAL), pod("b", prefill_tokens_per_s=4000.0)],
        ("b", None),
    ),
    "the emptier batch: its streams are harmed less and it answers faster": (
        [pod("a", running=60.0, **LOCAL), pod("b", running=2.0, **LOCAL)],
        ("b", None),
    ),
    "the pod with a seat: a full batch makes the request wait": (
        [pod("a", running=8.0, max_seqs=8.0, **LOCAL), pod("b", running=8.0, **LOCAL)],
        ("b", None),
    ),
    "the pod with memory: the other's blocks are all in use": (
        [
            pod("a", blocks_free=0.0, num_blocks=1000.0, **LOCAL),
            pod("b", blocks_free=0.0, blocks_cached=900.0, num_blocks=1000.0, **LOCAL),
        ],
        ("b", None),
    ),
    "a remote prefill: the link is fast and the decode pod is busy prefilling": (
        [
            pod("p", decode_weight=0.0),
            pod("d", wait_s=20.0, receive_bytes_per_s=FAST_LINK, **LOCAL),
        ],
        ("d", "p"),
    ),
    "a remote prefill: it would stop the streams that run": (
        [
            pod("p", decode_weight=0.0),
            pod("d", running=60.0, receive_bytes_per_s=FAST_LINK, **LOCAL),
        ],
        ("d", "p"),
    ),
    "local prefill: the transfer takes longer than computing": (
        [
            pod("p", decode_weight=0.0),
            pod("d", wait_s=1.0, receive_bytes_per_s=SLOW_LINK, **LOCAL),
        ],
        ("d", None),
    ),
    "local prefill: the decode pod has nearly all of the prompt": (
        [
            pod("p", decode_weight=0.0),
            pod("d", cached_tokens=7990, running=60.0, receive_bytes_per_s=FAST_LINK, **LOCAL),
        ],
        ("d", None),
    ),
    "local prefill: the prefill pod's queue is long": (
        [
            pod("p", decode_weight=0.0, wait_s=150.0),
            pod("d", running=30.0, receive_bytes_per_s=FAST_LINK, **LOCAL),
        ],
        ("d", None),
    ),
    "the prefill pod that has the prefix": (
        [
            pod("p", decode_weight=0.0),
            pod("q", decode_weight=0.0, cached_tokens=6000),
            pod("d", wait_s=20.0, receive_bytes_per_s=FAST_LINK, **LOCAL),
        ],
        ("d", "q"),
    ),
    "a prefill pod decodes when there is no other": (
        [pod("p", decode_weight=0.0)],
        ("p", None),
    ),
    "a suspected pod only when nothing else is left": (
        [pod("a", suspect=True, cached_tokens=8000), pod("b", wait_s=50.0, **LOCAL)],
        ("b", None),
    ),
    "a suspected pod is better than no answer": ([pod("a", suspect=True)], ("a", None)),
}


@pytest.mark.parametrize("why", COST_CASES)
def test_cost_chooses(why: str) -> None:
    pods, expected = COST_CASES[why]
    assert placed(pods) == expected


def test_a_role_can_be_flipped_gradually() -> None:
    pair = [pod("a", decode_weight=1.0, **LOCAL), pod("b", decode_weight=0.1, **LOCAL)]
    assert placed(pair)[0] == "a"
    later = [pod("a", wait_s=5.0, **LOCAL), pod("b", decode_weight=0.9, **LOCAL)]
    assert placed(later)[0] == "b"


def test_a_measured_pair_replaces_the_general_rate() -> None:
    columns = Endpoints.of([pod("p"), pod("d"), pod("e")], {0: {1: 5.0}})
    assert c.pair_rates(columns, 0).tolist() == [1e9, 5.0, 1e9]
    assert c.pair_rates(columns, 2).tolist() == [1e9, 1e9, 1e9]


def test_only_what_the_prefill_does_not_hide_of_a_transfer_counts() -> None:
    pods = [pod("p"), pod("d", bytes_per_token=1e6, receive_bytes_per_s=1e9)]
    # 8001 tokens: computed in 8.001 s, sent in 8.001 s: the last chunk of 512 is exposed
    exposed = c.exposed_transfer(QUERY, Endpoints.of(pods), 0, c.Prices())
    assert exposed[1] == pytest.approx(0.512)
    half = [pods[0], pod("d", bytes_per_token=1e6, receive_bytes_per_s=0.5e9)]
    exposed = c.exposed_transfer(QUERY, Endpoints.of(half), 0, c.Prices())
    assert exposed[1] == pytest.approx(1.024 + 8.001)


endpoints = st.builds(
    pod,
    st.just("x"),
    wait_s=st.floats(0, 100),
    running=st.integers(0, 200).map(float),
    cached_tokens=st.integers(0, 8000).map(float),
    prefill_weight=st.sampled_from([0.0, 0.5, 1.0]),
    decode_weight=st.sampled_from([0.0, 0.5, 1.0]),
    prefill_tokens_per_s=st.floats(10, 1e6),
    receive_bytes_per_s=st.floats(1e3, 1e12),
    suspect=st.booleans(),
    blocks_free=st.floats(0, 1e5),
    blocks_cached=st.floats(-1e5, 1e5),
)


@given(st.lists(endpoints, min_size=1, max_size=8), st.sampled_from(POLICY_NAMES))
def test_every_policy_finds_a_pod_whatever_they_report(pods: list[Endpoint], name: str) -> None:
    numbered = [Endpoint(**vars(p) | {"pod": str(i)}) for i, p in enumerate(pods)]
    decode, prefill = placed(numbered, routing_policy=name)
    assert decode != prefill
    if prefill is not None:
        assert numbered[int(prefill)].prefill_weight > 0
        assert not numbered[int(prefill)].suspect


@given(st.lists(endpoints, min_size=1, max_size=6))
def test_costs_are_finite_and_one_at_a_time_is_all_at_once(pods: list[Endpoint]) -> None:
    together = c.local_ttft(QUERY, Endpoints.of(pods))
    alone = [c.local_ttft(QUERY, Endpoints.of([p]))[0] for p in pods]
    assert together.tolist() == alone
    assert np.isfinite(together).all()
    assert np.isfinite(c.memory_wait(QUERY, Endpoints.of(pods))).all()


POLICY_CASES = {
    "prefix: most of the prompt, however long the queue": (
        "prefix",
        [pod("a"), pod("b", cached_tokens=16, wait_s=99.0)],
        "b",
    ),
    "prefix: the shorter queue breaks the tie": ("prefix", [pod("a", wait_s=1.0), pod("b")], "b"),
    "least_load: the shorter queue, wherever the prompt is": (
        "least_load",
        [pod("a", cached_tokens=8000, wait_s=0.1), pod("b")],
        "b",
    ),
    "least_load: fewer streams break the tie": (
        "least_load",
        [pod("a", running=2.0), pod("b", running=1.0)],
        "b",
    ),
}


@pytest.mark.parametrize("why", POLICY_CASES)
def test_policy_chooses(why: str) -> None:
    name, pods, expected = POLICY_CASES[why]
    assert placed(pods, routing_policy=name)[0] == expected


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_decode_only_pod_gets_a_prefill_pod_for_long_prompts(name: str) -> None:
    pods = [pod("p", decode_weight=0.0), pod("d", prefill_weight=0.0)]
    assert placed(pods, routing_policy=name) == ("d", "p")
    short = RouteQuery(hashes=b"", prompt_len=20)
    assert placed(pods, short, routing_policy=name) == ("d", None)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_only_pods_of_one_layout_prefill_for_each_other(name: str) -> None:
    decode = pod("d", prefill_weight=0.0, kv_layout=7.0)
    others = [pod(f"p{i}", decode_weight=0.0, kv_layout=8.0) for i in range(5)]
    alike = pod("alike", decode_weight=0.0, kv_layout=7.0, wait_s=1.0)
    assert placed([*others, decode], routing_policy=name) == ("d", None)
    assert placed([*others, decode, alike], routing_policy=name) == ("d", "alike")


# ---- the router


def test_a_burst_with_one_prefix_meets_in_one_place_until_that_is_dearer() -> None:
    router = make_router(pods=4)
    query = make_query(*range(100), tail=400)
    chosen = [router.route(query).decode_pod for _ in range(40)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 4


def test_a_burst_without_a_common_prefix_spreads_evenly() -> None:
    router = make_router(pods=4)
    chosen = Counter(router.route(make_query(i, *range(50))).decode_pod for i in range(40))
    assert set(chosen.values()) == {10}


def test_round_robin_takes_each_in_turn_and_skips_who_left() -> None:
    router = make_router(pods=3, routing_policy="round_robin")
    first = [router.route(make_query(1)).decode_pod for _ in range(3)]
    assert sorted(first) == ["p0", "p1", "p2"]
    router.fleet.lose(first[0])
    assert [router.route(make_query(1)).decode_pod for _ in range(2)] == first[1:]


def test_a_session_stays_and_only_the_sessions_of_a_lost_pod_move() -> None:
    router = make_router(pods=5, routing_policy="session")
    asked = [make_query(i, session=f"s{i}") for i in range(40)]
    before = [router.route(q).decode_pod for q in asked]
    assert before == [router.route(q).decode_pod for q in asked]
    router.fleet.lose("p2")
    after = [router.route(q).decode_pod for q in asked]
    assert all(b == a for b, a in zip(before, after, strict=True) if b != "p2")
    assert "p2" not in after


def test_power_of_two_prefers_the_shorter_queue_without_always_taking_the_shortest() -> None:
    router = make_router(pods=8, routing_policy="power_of_two")
    report(router, "p0", waiting_tokens=50_000)
    chosen = Counter(router.route(make_query(i)).decode_pod for i in range(60))
    assert chosen["p0"] == 0
    assert len(chosen) == 7


def test_equal_pods_are_taken_at_random_and_a_seed_repeats_it() -> None:
    def first(seed: int) -> str:
        return make_router(pods=8, routing_seed=seed).route(make_query(1)).decode_pod

    assert len({first(seed) for seed in range(20)}) > 3
    assert first(7) == first(7)


def test_excluded_draining_and_foreign_pods_are_not_chosen() -> None:
    router = make_router(pods=2)
    add_pod(router, "other", {"model": "other"})
    report(router, "p1", draining=True)
    assert router.route(make_query(1, model="")).decode_pod in ("p0", "other")
    assert router.route(make_query(1, model="other")).decode_pod == "other"
    with pytest.raises(ApiError) as error:
        router.route(make_query(1, exclude=frozenset(["p0", "other"])))
    assert error.value.code == "not_ready"
    with pytest.raises(ApiError, match="No pod serves the model"):
        router.route(make_query(1, model="unknown"))


def test_a_pod_serves_only_after_its_first_report() -> None:
    router = make_router(pods=0)
    router.fleet.connect(PodModel(pod="a"), router.clock())
    with pytest.raises(ApiError):
        router.route(make_query(1))
    report(router, "a")
    assert router.route(make_query(1)).decode_pod == "a"


def test_a_pod_that_measured_nothing_is_taken_to_be_as_fast_as_others_of_its_model() -> None:
    router = make_router(0)
    add_pod(router, "a", prefill_tokens_per_s=0.0, itl_s=0.0)
    add_pod(router, "foreign", {"model": "other"}, prefill_tokens_per_s=5.0)
    add_pod(router, "b", prefill_tokens_per_s=200.0, itl_s=0.5)
    add_pod(router, "late", prefill_tokens_per_s=0.0, itl_s=0.0)

    def rates() -> dict[str, tuple[float, float]]:
        pods = router.fleet.endpoints(make_query(1), router.clock())
        columns = zip(pods.pods, pods.prefill_tokens_per_s, pods.itl_s, strict=True)
        return {name: (rate, itl) for name, rate, itl in columns if name}

    assert rates()["a"] == rates()["late"] == (200.0, 0.5)
    assert rates()["foreign"][0] == 5.0
    report(router, "a", prefill_tokens_per_s=300.0, itl_s=0.1)
    assert rates()["a"] == (300.0, 0.1)
    assert rates()["late"] == (300.0, 0.1)


def test_a_silent_pods_cache_counts_as_unknown() -> None:
    clock = Clock()
    router = make_router(pods=1, clock=clock)
    cache(router, "p0", *range(50))
    assert router.route(make_query(*range(50))).decode_cached_tokens == 800
    clock.now += 10  # silent, and what was sent there is too old to count either
    decision = router.route(make_query(*range(50)))
    assert (decision.decode_pod, decision.decode_cached_tokens) == ("p0", 0)


def test_a_pod_that_keeps_less_than_it_says_is_believed_less_and_asked_again() -> None:
    clock = Clock()
    router = make_router(pods=1, clock=clock)
    cache(router, "p0", *range(50))
    for _ in range(6):
        router.observe(router.route(make_query(*range(50))).decision_id, 0)
        clock.now += 1
        router.fleet.hear("p0", clock())
    known = router.fleet.pods["p0"]
    assert known.resync
    clock.now += 10
    router.fleet.hear("p0", clock())
    assert router.route(make_query(*range(50))).decode_cached_tokens < 400
    cache(router, "p0", *range(50))
    assert not known.resync
    assert router.fleet.trust(known) == 1.0


def test_more_cached_than_expected_is_no_drift() -> None:
    router = make_router(pods=1)
    for _ in range(9):
        decision = router.route(make_query(*range(50)))
        router.observe(decision.decision_id, 800)
    assert router.fleet.trust(router.fleet.pods["p0"]) == 1.0


def test_a_report_replaces_what_was_assumed_but_for_the_latest_picks() -> None:
    clock = Clock()
    router = make_router(pods=1, clock=clock)
    query = make_query(1, tail=4000)
    router.route(query)
    clock.now += 1.0
    router.route(query)
    clock.now += 0.1
    report(router, "p0", running=1)
    pods = router.fleet.endpoints(query, clock())
    assert pods.running[0] == 2  # the report's, and the one too young to be in it
    assert pods.wait_s[0] == pytest.approx(4.0, abs=0.1)
    clock.now += 1.0
    report(router, "p0", running=2)
    pods = router.fleet.endpoints(query, clock())
    assert (pods.running[0], pods.wait_s[0]) == (2, 0)


def test_a_late_first_token_is_said_beforehand() -> None:
    router = make_router(pods=1)
    report(router, "p0", prefilling_tokens=60_000)
    assert router.route(make_query(1, deadline_s=10.0)).late
    assert not router.route(make_query(1, deadline_s=100.0)).late


def test_the_latest_decisions_can_be_explained_and_old_ones_make_way() -> None:
    router = make_router(pods=3, max_decisions=5)
    ids = [router.route(make_query(i, request_id="r")).decision_id for i in range(8)]
    assert [router.explain(i) is not None for i in ids] == [False] * 3 + [True] * 5
    assert len(router.decisions.of_request("r")) == 5
    explanation = router.explain(ids[-1])
    assert explanation.num_pods == 3
    scores = explanation.scores()
    assert scores[0].endpoint.pod == explanation.decision.decode_pod
    assert [name for name, _ in scores[0].costs] == ["cost_s"]
    assert router.observe(ids[0], 5) is None


def test_of_a_large_fleet_the_chosen_pods_are_always_explained() -> None:
    router = make_router(pods=100, routing_policy="round_robin")
    for _ in range(70):
        decision = router.route(make_query(1))
    shown = {s.endpoint.pod for s in router.explain(decision.decision_id).scores()}
    assert decision.decode_pod in shown
    assert len(shown) <= 32


@pytest.mark.parametrize(
    "fields",
    [{"prompt_len": 0}, {"hashes": b"short"}, {"expected_output": -1}],
    ids=["no prompt", "half a hash", "negative output"],
)
def test_a_question_without_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_query(1, **fields)
