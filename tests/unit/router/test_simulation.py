"""The modelled pods that policies are compared on: nothing lost, nothing from nowhere."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config.router import POLICY_NAMES, RouterConfig
from quire.router.simulation.clock import VirtualClock
from quire.router.simulation.pod import EngineModel, ModelPod, ModelRequest
from quire.router.simulation.replay import Replay, infinite_cache_hit_rate, read_trace

NEVER = 1 << 30


def hashes(*ids: int) -> tuple[bytes, ...]:
    return tuple(i.to_bytes(16, "little") for i in ids)


def trace_file(tmp_path, rows):
    path = tmp_path / "trace.jsonl"
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
    return path


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40), st.floats(0, 5)),
        min_size=1,
        max_size=25,
    )
)
def test_every_request_ends_and_every_block_comes_back(asked) -> None:
    clock = VirtualClock()
    pod = ModelPod("a", EngineModel(cache_blocks=12, block_size=16, max_seqs=3), clock)
    requests = []
    for family, blocks, output, at in asked:
        chain = hashes(*(100 * family + i for i in range(blocks)))
        request = ModelRequest(chain, 16 * blocks + 1, output, at)
        requests.append(request)
        clock.at(at, lambda r=request: pod.submit(r))
    clock.run()
    for r in requests:
        assert r.arrival <= r.first_token <= r.done
        assert r.cached_tokens < r.prompt_len
    assert pod.cache.anonymous == 0
    assert pod.cache.num_free + pod.cache.num_idle == 12
    # the events say what is there
    held: set[bytes] = set()
    for change in pod.cache.changes:
        assert (change.block_hash in held) is not change.stored
        held ^= {change.block_hash}
    assert len(held) == pod.cache.num_idle


def test_the_end_of_a_chain_is_evicted_first() -> None:
    clock = VirtualClock()
    pod = ModelPod("a", EngineModel(cache_blocks=6, block_size=16), clock)
    for at, first in ((0.0, 0), (10.0, 50)):
        request = ModelRequest(hashes(*range(first, first + 4)), 65, 1, at)
        clock.at(at, lambda r=request: pod.submit(r))
    clock.run()
    assert pod.cache.match(hashes(0, 1, 2, 3)) == 1


def test_the_ceiling_is_what_one_endless_cache_would_have(tmp_path) -> None:
    rows = [(0, 1100, 1, [1, 2, 3]), (9, 1100, 1, [1, 2, 4]), (9, 1024, 1, [1, 2])]
    trace = read_trace(trace_file(tmp_path, rows))
    # the partly filled third block is never cached, a prompt's last token always computed
    assert [len(r.hashes) for r in trace] == [2, 2, 2]
    assert infinite_cache_hit_rate(trace) == pytest.approx((1024 + 512) / 3224)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_replay_answers_every_request_and_predicts_its_hits(tmp_path, policy) -> None:
    rows = [(200 * i, 5000, 5, [1, 2, *(10 * (i % 7) + j for j in range(7))]) for i in range(60)]
    trace = read_trace(trace_file(tmp_path, rows))
    config = RouterConfig(routing_policy=policy, routing_seed=1, min_remote_prefill_tokens=NEVER)
    result = Replay(trace, config, EngineModel(cache_blocks=500), pods=3).run()
    assert len(result.requests) == 60
    assert not any(math.isnan(r.done) for r in result.requests)
    assert 0 < result.hit_rate <= infinite_cache_hit_rate(trace)
    assert result.prediction_error < 0.2
