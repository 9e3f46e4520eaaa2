"""`quire bench throughput` and `latency`: the arithmetic with a fake engine, and one real run."""

import json
import os
import subprocess
import sys
import time

import pytest

from quire.cli.bench.latency import line, measure
from quire.cli.bench.options import LatencyConfig
from quire.cli.bench.throughput import Measurement


class FakeLLM:
    """Takes 10 ms per call and remembers the prompts."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, params, use_tqdm):
        self.calls.append((prompts, params))
        time.sleep(0.01)


def test_latency_counts_the_runs_after_the_warm_up():
    llm = FakeLLM()
    config = LatencyConfig(input_len=5, output_len=7, num_iters=4, num_iters_warmup=2)
    row = measure(llm, config, 3, seed=0)
    assert len(llm.calls) == 6
    assert len(row["latencies"]) == 4
    assert 0.009 < row["avg_latency"] < 0.2
    assert list(row["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    prompts = [tuple(p["prompt_token_ids"]) for batch, _ in llm.calls for p in batch]
    assert {len(p) for p in prompts} == {5}
    assert len(set(prompts)) == 18, "no prompt twice: the prefix cache would answer it"
    assert {(p.max_tokens, p.ignore_eos) for _, p in llm.calls} == {(7, True)}
    assert "batch 3: mean" in line(row, config)


def test_throughput_is_tokens_over_time():
    figures = Measurement("quire", 2.0, 4, 100, 60).figures()
    assert figures["requests_per_second"] == 2
    assert figures["tokens_per_second"] == 80
    assert figures["output_tokens_per_second"] == 30


@pytest.mark.parametrize(
    "options",
    [
        ["--dataset-name", "prefix_repetition", "--prefix-repetition-output-len", "3"],
        ["--input-len", "20", "--output-len", "3"],
    ],
    ids=["prefix_repetition", "random"],
)
def test_throughput_of_the_demo_model(tmp_path, options):
    path = tmp_path / "r.json"
    done = subprocess.run(
        [sys.executable, "-m", "quire", "bench", "throughput", "demo", "--num-prompts", "4",
         "--output-json", str(path), "--disable-tqdm", *options],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "output tokens/s" in done.stdout
    result = json.loads(path.read_text())
    assert result["num_requests"] == 4
    assert result["output_tokens_per_second"] > 0
    assert result["engines"]["quire"]["total_num_tokens"] == result["total_num_tokens"]


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "quire", "bench", "latency", str(tmp_path / "none")],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("quire bench latency: error: no model folder")


@pytest.mark.parametrize("scheduling", ["--no-async-scheduling", "--async-scheduling"])
def test_the_phases_of_a_step_add_up_to_it(tmp_path, capsys, scheduling):
    from quire.cli.bench.step import PHASES, run

    path = tmp_path / "steps.json"
    argv = [
        "demo", "--max-model-len", "256", "--max-num-seqs", "4", "--batch-size", "1", "3",
        "--output-len", "8", "--input-len", "20", "--prefill-len", "40", "100", "9000",
        "--output-json", str(path), scheduling,
    ]  # fmt: skip
    assert run(argv) == 0
    assert "outside the model" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert [b["batch_size"] for b in data["batches"]] == [1, 3]
    for b in data["batches"]:
        assert 0 < b["outside_model_us"] < b["step_us"]
    assert data["engine"]["num_blocks"] > 0
    for row in data["steps"]:
        assert set(row["phases"]) == set(PHASES)
        beside = {"execute", "sample"} if scheduling == "--async-scheduling" else set()
        on_host = sum(s for phase, s in row["phases"].items() if phase not in beside)
        assert on_host == pytest.approx(row["seconds"], abs=1e-6)
    decodes = [r for r in data["steps"] if not r["prompt_tokens"]]
    assert {r["decodes"] for r in decodes} == {1, 3}
    assert max(r["phases"]["output"] for r in decodes) > 0
    prompts = {r["prompt_tokens"] for r in data["steps"]}
    assert {20, 60, 40, 100} <= prompts
    assert 9000 not in prompts, "beyond the model's length"


def test_the_engine_is_as_before_when_its_steps_were_timed():
    from quire import LLM
    from quire.cli.bench.step import StepClock

    llm = LLM("demo", max_model_len=64)
    before = llm.engine.step
    clock = StepClock(llm).attach()
    assert llm.engine.step != before
    clock.detach()
    assert llm.engine.step == before


def test_a_start_is_timed_until_its_first_token(tmp_path, capsys):
    from quire.cli.bench.startup import FIGURES, run

    path = tmp_path / "start.json"
    argv = ["--num-iters", "1", "--serve-args", "--max-model-len 64", "--output-json", str(path)]
    assert run(argv) == 0
    assert "first token" in capsys.readouterr().out
    times = [json.loads(path.read_text())[name][0] for name in FIGURES]
    assert 0 < times[0] <= times[1] <= times[2]


def test_a_start_that_fails_says_why(capsys):
    from quire.cli.bench.startup import run

    with pytest.raises(SystemExit) as ended:
        run(["--model", "/no/such/model", "--num-iters", "1"])
    assert ended.value.code == 2
    assert "/no/such/model" in capsys.readouterr().err
