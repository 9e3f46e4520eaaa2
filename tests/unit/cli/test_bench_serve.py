"""The load generator, against a real socket."""

import asyncio
import itertools
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cli.bench.client import Client, Endpoint, Outcome
from quire.cli.bench.datasets import Sample
from quire.cli.bench.load import LoadRun, arrival_times
from quire.cli.bench.options import DatasetConfig, LoadConfig
from quire.cli.bench.report import parse_goodput, percentile, summarize, table
from quire.cli.bench.serve import NotReadyError, measure, run
from quire.config.values import ConfigError

SMALL = DatasetConfig(num_prompts=8, random_input_len=5, random_output_len=4)


def body(**fields):
    return json.dumps({"stream": True, "max_tokens": 4, "prompt": [1, 2], **fields}).encode()


@pytest.mark.parametrize("fragment", [None, 1, 7, 64])
async def test_a_stream_is_timed_and_counted_however_it_is_cut(serving, fragment):
    async with serving(fragment=fragment) as server, Client(Endpoint(server.url), 10) as client:
        outcome = await client.stream("/v1/completions", body())
        assert outcome.ok, outcome.error
        assert len(outcome.arrivals) == outcome.output_tokens == 4
        assert outcome.prompt_tokens == 2
        assert 0 < outcome.ttft <= outcome.latency
        assert len(outcome.itls) == 3


async def test_the_role_chunk_of_a_chat_is_not_the_first_token(serving):
    async with serving(gap_s=0.05) as server, Client(Endpoint(server.url), 10) as client:
        outcome = await client.stream("/v1/chat/completions", body(messages=[]))
        assert outcome.ttft >= 0.04
        assert len(outcome.arrivals) == 4
        assert outcome.tpot >= 0.045


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_text_is_kept_for_those_who_go_on_with_it(serving, path):
    async with serving() as server, Client(Endpoint(server.url), 10) as client:
        asked = body(messages=[])
        assert (await client.stream(path, asked, keep_text=True)).text == "t0 é\nt1 é\nt2 é\nt3 é\n"
        assert (await client.stream(path, asked)).text == ""


async def test_connections_are_used_again(serving):
    async with serving() as server, Client(Endpoint(server.url), 10) as client:
        for _ in range(5):
            assert (await client.stream("/v1/completions", body())).ok
        assert server.connections == 1


async def test_without_usage_events_are_counted(serving):
    async with (
        serving(usage=False, ids=False) as server,
        Client(Endpoint(server.url), 10) as client,
    ):
        assert (await client.stream("/v1/completions", body())).output_tokens == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"cut_after": 2}, "closed the connection"),
        ({"gap_s": 5}, "no answer within"),
    ],
)
async def test_failures_are_outcomes(serving, options, message):
    async with serving(**options) as server, Client(Endpoint(server.url), 0.3) as client:
        outcome = await client.stream("/v1/completions", body())
        assert message in outcome.error
        assert not outcome.ok


async def test_no_server_is_an_outcome():
    async with Client(Endpoint("http://127.0.0.1:9"), 5) as client:
        assert "connection failed" in (await client.stream("/", b"{}")).error


async def test_requests_start_when_due_whatever_becomes_of_others(serving):
    async with serving(gap_s=0.05) as server, Client(Endpoint(server.url), 10) as client:
        load = await LoadRun(client, "/v1/completions").run(
            [body()] * 6, [0.02 * i for i in range(6)]
        )
        assert load.peak_concurrency == server.peak == 6
        starts = [o.sent for o in load.outcomes]
        assert starts == sorted(starts)
        assert starts[-1] - starts[0] > 0.09
        assert load.duration_s > 0.25


async def test_concurrency_is_bounded_and_waiting_is_not_latency(serving):
    async with serving(gap_s=0.01) as server, Client(Endpoint(server.url), 10) as client:
        load = await LoadRun(client, "/v1/completions").run([body()] * 6, [0.0] * 6, 2)
        assert server.peak == load.peak_concurrency == 2
        assert max(o.late for o in load.outcomes) > 0.07
        assert min(o.latency for o in load.outcomes) < 0.07 + max(o.late for o in load.outcomes)


@given(st.integers(2, 200), st.floats(0.1, 1000), st.floats(0.05, 50), st.integers(0, 5))
def test_arrivals_rise_and_keep_the_rate(count, rate, burstiness, seed):
    config = LoadConfig(request_rate=repr(rate), burstiness=burstiness)
    times = arrival_times([Sample([1], 1)] * count, config, seed)
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx((count - 1) / rate)
    assert times == arrival_times([Sample([1], 1)] * count, config, seed)


def test_burstiness_is_the_shape_of_the_gaps():
    def variation(burstiness):
        config = LoadConfig(request_rate="1", burstiness=burstiness)
        times = arrival_times([Sample([1], 1)] * 5000, config, 0)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return math.sqrt(sum((g - 1) ** 2 for g in gaps) / len(gaps))

    for burstiness in (0.25, 1, 4):  # a gamma's coefficient of variation is 1 / sqrt(shape)
        assert variation(burstiness) == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)


def test_a_trace_is_replayed_faster_on_request():
    samples = [Sample([1], 1, arrival_s=t) for t in (0.0, 1.0, 4.0)]
    assert arrival_times(samples, LoadConfig(trace_speedup=2), 0) == [0, 0.5, 2]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_lie_within_the_values(values, percent):
    ordered = sorted(values)
    assert ordered[0] - 1e-6 <= percentile(ordered, percent) <= ordered[-1] + 1e-6
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 100) == ordered[-1]


def test_the_summary_is_arithmetic_on_the_outcomes():
    from quire.cli.bench.load import Load

    outcomes = [
        Outcome(sent=0, arrivals=[0.1, 0.2, 0.4], prompt_tokens=10, output_tokens=3),
        Outcome(sent=1, arrivals=[2.0], prompt_tokens=5, output_tokens=1),
        Outcome(sent=1, error="HTTP 503"),
    ]
    result = summarize(Load(outcomes, 2.0, 2), parse_goodput(["ttft:500", "tpot:200"]))
    assert result["completed"] == 2
    assert result["failed"] == 1
    assert result["total_output_tokens"] == 4
    assert result["output_throughput"] == 2
    assert result["total_token_throughput"] == 9.5
    assert result["request_goodput"] == 0.5
    assert result["mean_ttft_ms"] == pytest.approx(550)
    assert result["mean_tpot_ms"] == pytest.approx(150)
    assert result["median_itl_ms"] == pytest.approx(150)
    assert result["p99_e2el_ms"] == pytest.approx(400 + 0.99 * 600)
    assert "P99 TTFT (ms):" in table(result)


def test_a_request_with_one_long_gap_misses_its_itl():
    smooth = Outcome(sent=0, arrivals=[0.1 * i for i in range(1, 12)], output_tokens=11)
    stalled = Outcome(sent=0, arrivals=[*smooth.arrivals[:-1], 5.0], output_tokens=11)
    [objective] = parse_goodput(["itl:150"])
    assert objective.met(smooth)
    assert not objective.met(stalled)


@pytest.mark.parametrize("text", ["ttft", "ttft:x", ":5"])
def test_a_bad_objective_is_named(text):
    with pytest.raises(ConfigError, match="goodput"):
        parse_goodput([text])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
async def test_a_whole_run_has_vllms_names(serving, backend, tmp_path):
    dataset = SMALL
    if backend == "openai-chat":
        path = tmp_path / "c.json"
        chat = {"conversations": [{"value": "hello you"}, {"value": "x" * 16}]}
        path.write_text(json.dumps([chat]))
        dataset = DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=8)
    async with serving(gap_s=0.002) as server:
        load = LoadConfig(
            base_url=server.url + "/v1", backend=backend, request_rate="200", api_key="sk-x",
            goodput=("e2el:5000",), extra_body='{"top_k": 1}',
        )  # fmt: skip
        result = await measure(load, dataset)
    assert result["completed"] == 8
    assert result["model_id"] == "fake"
    assert result["total_output_tokens"] == 32
    assert result["request_goodput"] == result["request_throughput"]
    for name in ("mean_ttft_ms", "p99_itl_ms", "median_tpot_ms", "p95_e2el_ms", "std_ttft_ms"):
        assert result[name] > 0 or name.startswith("std"), name
    assert len(result["ttfts"]) == len(result["itls"]) == 8
    assert len(server.requests) == 9, "one warm-up"
    _, request = server.requests[-1]
    assert request["ignore_eos"] is True
    assert request["top_k"] == 1
    assert server.headers[-1]["authorization"] == "bearer sk-x"


async def test_a_server_that_does_not_come_up_is_an_error():
    load = LoadConfig(base_url="http://127.0.0.1:9", ready_check_timeout_sec=0.1)
    with pytest.raises(NotReadyError, match="not ready"):
        await measure(load, SMALL)


async def test_a_server_that_refuses_the_warm_up_is_an_error(serving):
    async with serving(status=401) as server:
        with pytest.raises(NotReadyError, match="HTTP 401"):
            await measure(LoadConfig(base_url=server.url), SMALL)


async def test_token_ids_cannot_be_a_chat(serving):
    async with serving() as server:
        with pytest.raises(ConfigError, match="token ids"):
            await measure(LoadConfig(base_url=server.url, backend="openai-chat"), SMALL)


async def test_the_command_prints_a_table_and_saves_results(serving, capsys, tmp_path):
    async with serving() as server:
        argv = [
            "--base-url", server.url, "--num-prompts", "3", "--input-len", "4", "--output-len", "2",
            "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json",
            "--label", "try",
        ]  # fmt: skip
        assert await asyncio.to_thread(run, argv) == 0
    out = capsys.readouterr().out
    assert "Successful requests:" in out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["completed"] == 3
    assert saved["label"] == "try"
    assert "ttfts" not in saved


async def test_the_client_is_cheap_per_token(serving):
    """The parser alone: the fake server shares this process."""
    from quire.cli.bench.client import _Stream

    event = b'data: {"id":"c","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
    outcome = Outcome()
    sink = _Stream(outcome)
    began = time.process_time()
    for _ in range(20_000):
        sink.feed(event)
    assert len(outcome.arrivals) == 20_000
    assert time.process_time() - began < 20_000 * 50e-6, "2 us on an idle machine"
