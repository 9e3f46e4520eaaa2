"""Scenarios are data: what is wrong in one is said, and what it draws is the same each time."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loadtest.scenario import (
    Arrivals,
    Length,
    Prefix,
    RequestClass,
    Scenario,
    load_scenario,
    parse_scenario,
    scenario_names,
)
from loadtest.workload import sessions, start_times, text, trace_sessions

from quire.cli.bench.options import DatasetConfig
from quire.config.values import ConfigError

CLASS = {"name": "a", "input_len": 5, "output_len": [2, 4]}
WANTED = {"chat", "rag", "agents", "burst", "long-context", "mixed"}


def take(scenario, count, seed=0):
    return list(itertools.islice(sessions(scenario, seed, 5000), count))


def test_the_scenarios_of_the_folder_can_be_read_and_drawn_from():
    assert set(scenario_names()) >= WANTED
    for name in scenario_names():
        scenario = load_scenario(name)
        assert scenario.summary
        assert scenario.window_s > 0
        if scenario.requests:
            assert all(s.turns[0].output_len > 0 for s in take(scenario, 20))


def test_rag_shares_its_2k_prefixes():
    scenario = load_scenario("rag")
    prompts = [s.prompt([], is_chat=False) for s in take(scenario, 100)]
    beginnings = {tuple(p[:2048]) for p in prompts}
    assert len(beginnings) == 8
    assert len({tuple(p) for p in prompts}) == 100


def test_agents_send_their_history():
    session = next(s for s in take(load_scenario("agents"), 50) if len(s.turns) > 3)
    prompts = [session.prompt(["an answer"] * n, is_chat=False) for n in range(4)]
    assert all(b.startswith(a) for a, b in itertools.pairwise(prompts))
    chat = session.prompt(["one", "two"], is_chat=True)
    roles = [message["role"] for message in chat]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert chat[2]["content"] == "one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 3}, "unknown key 'windows'.*window_s"),
        ({"arrivals": {"process": "poison"}}, "poisson"),
        ({"arrivals": {"request_rate": 0}}, "above 0"),
        ({"arrivals": {"process": "closed"}}, "max_concurrency"),
        ({"arrivals": {"process": "trace"}}, "dataset_path"),
        ({"requests": []}, "at least one class"),
        ({"requests": [CLASS | {"input_len": [5, 2]}]}, "cannot be"),
        ({"requests": [CLASS | {"prefix": {"len": 5}}]}, "unknown key 'len'"),
        ({"window_s": 0}, "window_s"),
    ],
)
def test_a_bad_scenario_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_scenario("x", {"requests": [CLASS], **change})


def test_an_unknown_scenario_lists_the_known_ones():
    with pytest.raises(ConfigError, match="long-context"):
        load_scenario("nothing-like-it")


@given(st.integers(0, 50), st.integers(1, 500), st.floats(0.1, 2), st.integers(0, 3))
def test_lengths_stay_within_their_bounds(low, mean, sigma, seed):
    length = Length(low, low + 300, float(mean), sigma)
    rng = random.Random(seed)
    assert all(low <= length.draw(rng) <= low + 300 for _ in range(50))


@pytest.mark.parametrize("process", ["poisson", "gamma", "constant"])
def test_arrivals_rise_at_the_rate_and_repeat_with_the_seed(process):
    arrivals = Arrivals(process=process, request_rate=50, burstiness=0.5)
    scenario = Scenario(name="x", arrivals=arrivals, warm_up_s=10, window_s=80, cool_down_s=10)
    times = list(start_times(scenario, 1))
    assert times == sorted(times) == list(start_times(scenario, 1))
    assert 4300 < len(times) < 5700
    assert times[-1] < 100
    if process != "constant":
        assert times != list(start_times(scenario, 2))


def test_sessions_follow_the_shares_and_the_seed():
    kinds = [
        RequestClass(name="a", share=3),
        RequestClass(name="b", prefix=Prefix(count=1, length=9)),
    ]
    scenario = Scenario(name="x", requests=kinds)
    drawn = take(scenario, 1000)
    assert drawn == take(scenario, 1000)
    assert drawn != take(scenario, 1000, seed=1)
    assert 0.7 < sum(s.request_class == "a" for s in drawn) / 1000 < 0.8
    assert {len(s.prefix) for s in drawn if s.request_class == "b"} == {9}


def test_a_trace_keeps_its_times_and_shared_blocks(tmp_path):
    path = tmp_path / "t.jsonl"
    line = '{{"timestamp": {}, "input_length": 600, "output_length": 3, "hash_ids": [1, {}]}}\n'
    path.write_text("".join(line.format(1000 * i, 10 + i) for i in range(10)))
    scenario = Scenario(
        name="x", warm_up_s=0, window_s=2, cool_down_s=0,
        arrivals=Arrivals(process="trace", dataset_path=str(path), trace_speedup=2),
    )  # fmt: skip
    dataset = DatasetConfig(dataset_name="mooncake", dataset_path=str(path))
    planned = list(trace_sessions(scenario, dataset))
    assert [at for at, _ in planned] == [0, 0.5, 1, 1.5, 2]
    prompts = [s.prompt([], is_chat=False) for _, s in planned]
    assert prompts[0][:512] == prompts[1][:512]
    assert prompts[0][512:] != prompts[1][512:]


def test_text_has_as_many_words_as_ids():
    assert len(text(range(1000)).split()) == 1000
