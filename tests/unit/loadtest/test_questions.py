"""The tools that answer one question each, run tiny."""

import asyncio
import json

import pytest
from loadtest import exposed_transfer, host_path, itl_under_prefill, prefix_cache
from loadtest.prefix_cache import prompts

from quire.cli.bench.client import Outcome


def test_prompts_share_the_part_that_was_asked_for():
    options = prefix_cache.parse(["--input-len", "100", "--num-prompts", "3"])
    made = prompts(0.5, 1, options)
    assert {len(p) for p in made} == {100}
    assert len({tuple(p[:48]) for p in made}) == 1, "50 tokens, in whole blocks"
    assert len({tuple(p[48:52]) for p in made}) == 3
    assert made == prompts(0.5, 1, options)
    assert made[0][:48] != prompts(0.5, 2, options)[0][:48]


def test_the_cache_spares_what_is_shared(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = [
        "demo", "--input-len", "96", "--output-len", "2", "--num-prompts", "3",
        "--shared", "0", "0.75", "--repeats", "1", "--out", str(tmp_path / "prefix"),
    ]  # fmt: skip
    assert prefix_cache.main(argv) == 0
    assert "shared  75%" in capsys.readouterr().out
    rows = json.loads((tmp_path / "prefix.json").read_text())["rows"]
    assert [row["shared"] for row in rows] == [0, 0.75]
    assert all(row["bound"] >= 1 for row in rows)
    assert (tmp_path / "prefix.png").exists()


def test_only_gaps_that_end_in_the_window_count():
    outcome = Outcome(arrivals=[0.0, 1.0, 2.5, 6.0])
    assert itl_under_prefill._gaps(outcome, (0.9, 3.0)) == [1.0, 1.5]


def test_the_host_path_is_told_part_by_part(tmp_path, capsys):
    out = tmp_path / "host"
    assert host_path.main(["--batch", "2", "--prompt-len", "64", "--out", str(out)]) == 0
    assert "per 1,000 prompt tokens" in capsys.readouterr().out
    parts = json.loads(out.with_suffix(".json").read_text())
    assert parts["per_token_us"].keys() >= {"message", "to bytes", "journal", "text", "event"}
    assert all(us > 0 for us in parts["per_token_us"].values())


@pytest.mark.slow
def test_both_server_shapes_are_measured_in_turn(tmp_path):
    argv = [
        "demo", "--prompt-lens", "256", "--max-model-len", "1024", "--repeats", "1",
        "--prompts", "2", "--stream-tokens", "900", "--streams", "2", "--settle-s", "0.1",
    ]  # fmt: skip
    [row] = asyncio.run(itl_under_prefill.rounds(itl_under_prefill.parse(argv)))
    assert set(row["medians"]) == {"aggregated", "P/D"}
    assert all(m["gaps"] > 0 and m["ttft_p50_ms"] > 0 for m in row["medians"].values())
    assert "P99 ITL aggregated over P/D" in itl_under_prefill.table(row)


def test_shares_of_a_trace_are_of_its_time_to_first_token():
    parts = {"prefill_ask": 0.1, "prefill_queue": 0.1, "prefill": 1.5, "transfer": 0.2}
    parts |= {"commit": 0.1}
    named = [{"name": name, "seconds": seconds} for name, seconds in parts.items()]
    shares = exposed_transfer.shares_of({"ttft_s": 2.0, "parts": named})
    assert shares == pytest.approx(
        {"ttft_s": 2.0, "exposed_ms": 300, "exposed": 0.15, "asking": 0.1, "prefill": 0.75}
    )


@pytest.mark.slow
def test_exposed_transfer_is_told_for_each_transport(tmp_path, capsys):
    out = tmp_path / "exposed"
    argv = ["demo", "--prompt-lens", "256", "--transports", "tcp", "grpc", "--repeats", "1"]
    argv += ["--prompts", "1", "--max-model-len", "1024", "--out", str(out)]
    assert exposed_transfer.main(argv) == 0
    assert "exposed transfer" in capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["transport"] for row in rows] == ["tcp", "grpc"]
    assert all(0 <= row["exposed"]["median"] < 1 for row in rows)
