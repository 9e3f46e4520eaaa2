"""How many pods a trace needs: the searches, fleets of two roles, and engines fitted to steps."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config.router import RouterConfig
from quire.router.simulation.fit import fit_engine
from quire.router.simulation.pod import EngineModel
from quire.router.simulation.replay import FleetShape, Replay, TraceRequest
from quire.router.simulation.sizing import Objective, Sizing, overlay

CONFIG = RouterConfig(routing_seed=1)
MODEL = EngineModel(prefill_tokens_per_s=8000, max_seqs=32, cache_blocks=4000)
REMOTE = RouterConfig(routing_seed=1, routing_policy="least_load")
"""Every prompt of a decode pod is prefilled elsewhere, whatever that costs."""
STRICT = Objective(ttft_s=1.0, itl_s=0.03, share=0.95)


def trace(count: int, gap_s: float, prompt_len: int = 2000, output_len: int = 60):
    def request(i):
        own = tuple((1000 * i + j).to_bytes(16, "little") for j in range(prompt_len // 512))
        return TraceRequest(i * gap_s, prompt_len, output_len, own)

    return [request(i) for i in range(count)]


def sizing(requests, objective=STRICT):
    return Sizing(requests, CONFIG, MODEL, objective)


def test_every_request_ends_once_and_all_blocks_come_back_when_roles_are_split():
    replay = Replay(trace(120, 0.05), REMOTE, MODEL, FleetShape(prefill=3, decode=2))
    result = replay.run()
    assert not any(math.isnan(r.done) for r in result.requests)
    assert all(r.arrival < r.first_token <= r.done for r in result.requests)
    assert {d.decode_pod.split("-")[0] for d in result.decisions} == {"decode"}
    assert {d.prefill_pod.split("-")[0] for d in result.decisions} == {"prefill"}
    for pod in replay._pods.values():
        assert pod.cache.anonymous == 0
        assert pod.cache.num_free + pod.cache.num_idle == MODEL.cache_blocks


def test_a_slower_wire_delays_first_tokens():
    def mean_ttft(rate):
        model = replace(MODEL, transfer_bytes_per_s=rate)
        shape = FleetShape(prefill=2, decode=1)
        return Replay(trace(20, 1.0), REMOTE, model, shape).run().ttft_s()["mean"]

    last_chunk = 2000 * MODEL.bytes_per_token
    assert mean_ttft(last_chunk) - mean_ttft(1e15) == pytest.approx(1.0, rel=0.05)


def test_more_load_never_needs_fewer_pods():
    loads = [trace(150, gap_s) for gap_s in (0.4, 0.2, 0.1, 0.05)]
    equal = [sizing(t).aggregated(64).total for t in loads]
    split = [sizing(t).disaggregated(64) for t in loads]
    assert equal == sorted(equal)
    assert equal[0] < equal[-1]
    totals = [shape.total for shape in split]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


def test_a_laxer_objective_never_needs_more_pods():
    requests = trace(120, 0.08)
    needs = [
        sizing(requests, replace(STRICT, ttft_s=ttft_s, itl_s=1.0)).aggregated(64).total
        for ttft_s in (0.4, 1.0, 4.0, 60.0)
    ]
    assert all(a >= b for a, b in pairwise(needs))
    assert needs[0] > needs[-1]


def test_the_answer_keeps_the_objective_and_no_neighbour_below_does():
    found = sizing(trace(150, 0.05))
    shape = found.disaggregated(64)
    assert found.is_enough(shape)
    for fewer in (
        replace(shape, prefill=shape.prefill - 1),
        replace(shape, decode=shape.decode - 1),
    ):
        assert not (fewer.prefill and fewer.decode) or not found.is_enough(fewer)
    equal = found.aggregated(64)
    assert found.is_enough(equal)
    assert equal.both == 1 or not found.is_enough(FleetShape(both=equal.both - 1))


def test_what_no_fleet_can_keep_is_no_answer():
    impossible = replace(STRICT, ttft_s=1e-6)
    assert sizing(trace(10, 0.1), impossible).aggregated(8) is None
    assert sizing(trace(10, 0.1), impossible).disaggregated(8) is None


def test_laid_over_itself_a_trace_has_more_of_everything_but_shared_prefixes():
    plain = trace(40, 0.1)
    laid = overlay(plain, 3)
    assert len(laid) == 120
    assert [r.arrival_s for r in laid] == sorted(r.arrival_s for r in laid)
    assert max(r.arrival_s for r in laid) <= max(r.arrival_s for r in plain) + 0.01
    assert len({h for r in laid for h in r.hashes}) == 3 * len({h for r in plain for h in r.hashes})


FACTS = {
    "num_blocks": 6400, "block_size": 16, "block_bytes": 65536,
    "max_num_seqs": 48, "max_num_batched_tokens": 1024,
}  # fmt: skip


@settings(deadline=None)
@given(st.floats(1e-4, 0.1), st.floats(0, 0.01), st.floats(500, 1e6))
def test_a_fit_finds_the_engine_that_took_the_steps(step_s, per_stream, rate):
    def step(decodes, tokens, disturbed=1.0):
        seconds = (step_s + per_stream * decodes + tokens / rate) * disturbed
        return {"decodes": decodes, "prompt_tokens": tokens, "seconds": seconds}

    steps = [step(d, 0) for d in (1, 1, 8, 8, 32, 32, 32)] + [step(32, 0, 50.0)]
    steps += [step(0, n) for n in (128, 512, 1024)]
    model = fit_engine(steps, FACTS, 512)
    assert model.step_s == pytest.approx(step_s, rel=1e-3)
    assert model.step_s_per_stream == pytest.approx(per_stream, rel=1e-3, abs=1e-9)
    assert model.prefill_tokens_per_s == pytest.approx(rate, rel=0.01)
    assert (model.max_seqs, model.chunk_tokens, model.cache_blocks) == (48, 1024, 200)
    assert model.bytes_per_token == 4096


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"decodes": 1, "prompt_tokens": 0, "seconds": 1.0}], "two batch sizes"),
        ([{"decodes": d, "prompt_tokens": 0, "seconds": 1.0} for d in (1, 2)], "prompt chunk"),
    ],
)
def test_steps_that_cannot_tell_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        fit_engine(steps, FACTS, 512)


def test_the_command_answers_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import json

    from loadtest.fleet import main

    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": 3000, "output_length": 20, "hash_ids": [{}, 7]}}\n'
    path.write_text("".join(line.format(200 * i, i) for i in range(40)))
    assert main([str(path), "--loads", "1", "3", "--out", str(tmp_path / "need")]) == 0
    assert "prefill + decode" in capsys.readouterr().out
    needs = json.loads((tmp_path / "need.json").read_text())["needs"]
    assert [n["requests"] for n in needs] == [40, 120]
    assert needs[0]["aggregated"] <= needs[1]["aggregated"]
    assert (tmp_path / "need.png").stat().st_size > 1000
