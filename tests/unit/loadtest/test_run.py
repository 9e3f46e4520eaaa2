"""A scenario against a real socket: what is sent, what is counted, what is written."""

import asyncio
import json

import pytest
from fake_openai_server import running
from loadtest.__main__ import ScenarioConfig, main, measure
from loadtest.figures import series, window_figures
from loadtest.runner import Request, Run
from loadtest.scenario import Scenario

from quire.cli.bench.client import Outcome
from quire.cli.bench.options import TargetConfig

SCENARIO = """
summary: Small.
arrivals: {process: constant, request_rate: 10}
warm_up_s: 0.2
window_s: 0.8
cool_down_s: 2
goodput: ["ttft:5000"]
requests:
  - {name: one, input_len: 4, output_len: 2}
  - {name: many, share: 2, prefix: {count: 1, length: 3}, input_len: 4, output_len: 3, turns: 3}
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return str(path)


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
async def test_turns_follow_answers_and_the_window_counts(scenario, backend):
    async with running() as server:
        config = ScenarioConfig(scenario=scenario)
        [result] = await measure(config, TargetConfig(base_url=server.url, backend=backend))
    assert result["failed"] == 0
    assert 0 < result["requests_counted"] < result["requests_sent"]
    assert result["requests_sent"] == len(server.requests) - 1, "one warm-up"
    assert result["goodput_share"] == 1
    assert result["classes"].keys() <= {"one", "many"}
    asked = [r for _, r in server.requests if r["max_tokens"] == 3]
    if backend == "openai-chat":
        assert any("t0 é" in m["content"] for r in asked for m in r["messages"])
    else:
        assert all(isinstance(r["prompt"], str) for r in asked)
        assert any("t0 é" in r["prompt"] for r in asked)


async def test_a_closed_loop_keeps_its_concurrency(tmp_path):
    path = tmp_path / "closed.yaml"
    path.write_text(SCENARIO.replace("process: constant", "process: closed, max_concurrency: 3"))
    async with running(gap_s=0.01) as server:
        [result] = await measure(
            ScenarioConfig(scenario=str(path)), TargetConfig(base_url=server.url)
        )
        assert server.peak == 3
    assert result["completed"] > 3


async def test_the_command_writes_json_and_plots_for_each_rate(scenario, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    async with running() as server:
        argv = [
            scenario, "--base-url", server.url, "--request-rate", "5", "10",
            "--result-dir", str(tmp_path / "out"), "--label", "try",
        ]  # fmt: skip
        assert await asyncio.to_thread(main, argv) == 0
    assert "within ttft:5000: 100.0 %" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "try-small-10.json", "try-small-10.png", "try-small-5.json", "try-small-5.png",
        "try-small-rates.png",
    ]  # fmt: skip
    saved = json.loads((tmp_path / "out" / "try-small-10.json").read_text())
    assert saved["request_rate"] == 10
    assert len(saved["samples"]["ttfts"]) == saved["requests_sent"]


def test_only_the_windows_requests_and_tokens_count():
    def request(due, arrivals):
        return Request("a", 0, due, Outcome(sent=100 + due, arrivals=arrivals, output_tokens=4))

    scenario = Scenario(name="x", warm_up_s=1, window_s=2, cool_down_s=1, goodput=("ttft:500",))
    run = Run(100.0, [
        request(0.5, [100.9, 101.1]),  # before the window; one event of two tokens in it
        request(1.5, [101.6, 102.9]),  # in it, and good
        request(2.9, [104.0, 104.1]),  # in it, late, and its tokens come after it
        request(3.1, [103.2, 103.3]),  # behind it
    ])  # fmt: skip
    figures = window_figures(run, scenario)
    assert figures["requests_counted"] == 2
    assert figures["output_throughput"] == (2 + 4) / 2
    assert figures["goodput_share"] == 0.5
    assert figures["request_goodput"] == 0.5
    assert sum(series(run)["output_tokens_per_s"]) == 16
