"""The comparison: who runs when, what is divided by what, and a real engine process."""

import json
import os
import signal
import subprocess

import pytest
from loadtest.compare.__main__ import line, main
from loadtest.compare.environments import PEERS, PeerMissing
from loadtest.compare.process import Answer, EngineProcess, Frozen
from loadtest.compare.rounds import Series, alternate, ratios
from loadtest.compare.workloads import workloads
from loadtest.shapes import build

from quire import LLM, SamplingParams


class FakeGroup:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def freeze(self):
        self.log.append(("freeze", self.name))

    def thaw(self):
        self.log.append(("thaw", self.name))


class FakeContestant:
    def __init__(self, log, name):
        self.name, self.group = name, FakeGroup(log, name)


def test_one_runs_while_the_others_are_frozen_and_the_first_round_does_not_count():
    log = []
    both = [FakeContestant(log, "a"), FakeContestant(log, "b")]

    def measure(contestant, number):
        log.append(("run", contestant.name))
        return {"tok/s": 10.0 * number + (contestant.name == "a")}

    figures = alternate(both, 2, measure)
    assert figures["tok/s"]["a"].values == [11, 21]
    assert figures["tok/s"]["b"].values == [10, 20]
    for i in range(0, len(log), 3):
        assert [what for what, _ in log[i : i + 3]] == ["thaw", "run", "freeze"]
        assert len({name for _, name in log[i : i + 3]}) == 1
    order = [name for what, name in log if what == "run"]
    assert order == ["b", "a", "a", "b", "b", "a"], "the order turns from round to round"


def test_ratios_are_of_the_same_round():
    series = {"quire": Series([10, 40, 30]), "peer": Series([5, 10, 30])}
    [row] = ratios(series, "quire")
    assert (row["ratio"], row["low"], row["high"]) == (2, 1, 4)
    [row] = ratios(series, "quire", higher_is_better=False)
    assert row["ratio"] == 0.5


class FakeEngine:
    """10 ms per prompt, 1 ms per output token behind the first."""

    def __init__(self):
        self.prompts = []

    def ask(self, prompts, output_lens, *, tokens=False):
        self.prompts += [tuple(p) for p in prompts]
        seconds = 0.01 * len(prompts) + 0.001 * max(n - 1 for n in output_lens)
        return Answer(seconds, sum(output_lens), None)


def test_decode_leaves_the_prompts_out_and_no_prompt_comes_twice():
    engine = FakeEngine()
    decode, mix, prefill = workloads("S", ["decode", "mix", "prefill"], [8])
    assert decode.measure(engine, 1) == pytest.approx(8 / 0.001)
    assert prefill.measure(engine, 1) == pytest.approx(32 * 128 / 0.32)
    mix.measure(engine, 1)
    decode.measure(engine, 2)
    assert len(set(engine.prompts)) == len(engine.prompts)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build("tiny", folder / "models" / "tiny")
    return folder


def test_a_shape_is_a_folder_that_loads_and_whose_layers_decide(cache):
    llm = LLM(str(cache / "models" / "tiny"), max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [answer] = llm.generate({"prompt_token_ids": list(range(50, 90))}, params, use_tqdm=False)
    tokens = answer.outputs[0].token_ids
    assert len(set(tokens)) > 3, "or equal tokens of two engines would say nothing"


def test_an_engine_process_answers_is_frozen_and_ends(cache):
    model = cache / "models" / "tiny"
    prompts, lengths = [list(range(20, 60)), list(range(300, 310))], [6, 3]
    engine = EngineProcess(PEERS["quire"], model, "float32", cache, 1)
    try:
        engine.wait_ready()
        assert engine.name.startswith("quire")
        answer = engine.ask(prompts, lengths, tokens=True)
        engine.group.freeze()
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(engine.group.process.pid)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert state.startswith("T")
        engine.group.thaw()
        assert engine.ask(prompts, lengths, tokens=True).token_ids == answer.token_ids
    finally:
        engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(engine.group.process.pid, 0)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    asked = [{"prompt_token_ids": p} for p in prompts]
    llm = LLM(str(model), dtype="float32", max_model_len=128)
    want = [o.outputs[0].token_ids for o in llm.generate(asked, params, use_tqdm=False)]
    assert answer.token_ids == want


def test_an_engine_that_does_not_start_is_missing_with_its_log(cache, tmp_path):
    engine = EngineProcess(PEERS["quire"], tmp_path / "no-model", "float32", cache, 1)
    try:
        with pytest.raises(PeerMissing, match=r"quire ended.*quire\.log"):
            engine.wait_ready()
    finally:
        engine.close()


def test_a_group_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("loadtest.compare.process.END_S", 0.5)
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo on; while :; do sleep 0.1; done"],
        start_new_session=True, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process.stdout:
        assert process.stdout.readline() == "on\n"
        group = Frozen(process)
        group.freeze()
        group.end()
    assert process.returncode == -signal.SIGKILL


def test_the_command_measures_and_writes(cache, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out" / "compare"
    argv = [
        "--cache-dir", str(cache), "--shapes", "tiny", "--peers", "--tests", "mix", "http",
        "--repeats", "1", "--threads", "1", "--http-concurrency", "2", "--http-prompts", "4",
        "--check", "--out", str(out),
    ]  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(argv) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr().out
    assert "greedy tokens equal to ours" in printed
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    figures = {(row["test"], row["figure"]) for row in rows}
    assert ("mix", "tok/s") in figures
    assert ("http conc 2", "p99_ttft_ms") in figures
    ttfts = [row["engines"]["quire"] for row in rows if row["figure"] == "p50_ttft_ms"]
    assert [s["median"] > 0 for s in ttfts] == [True]
    assert line(rows[0]).startswith("tiny mix tok/s: quire")
