"""Both samplers against a slow, plain reading of the contract, and against each other."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.kernels import cpu, torch_sampler
from quire.kernels.sampling import DRAW_RULE, LogitEdits, SamplingBatch

Sample = Callable[..., np.ndarray]


def torch_sample(logits: np.ndarray, batch: SamplingBatch, invalid=None) -> np.ndarray:
    flags = None if invalid is None else torch.from_numpy(invalid)
    return torch_sampler.sample(torch.from_numpy(logits), batch, flags).numpy()


@pytest.fixture(params=["torch", "cpu"])
def sample(request) -> Sample:
    if request.param == "torch":
        return torch_sample
    return request.getfixturevalue("cpu_samplers")[0].sample


def make_batch(num_draws: int, **changes: Any) -> SamplingBatch:
    """Draws at temperature 1 from row 0, each at its own position."""
    values = {"rows": 0, "temperature": 1, "top_p": 1, "position": np.arange(num_draws)} | changes
    rows = np.broadcast_to(np.asarray(values.pop("rows"), np.int32), num_draws).copy()
    position = np.broadcast_to(np.asarray(values.pop("position"), np.uint32), num_draws).copy()
    edits = values.pop("edits", None)
    rules = np.zeros(num_draws, DRAW_RULE)
    for name, value in values.items():
        rules[name] = value
    return SamplingBatch(rows, rules, position, edits)


def make_edits(num_draws: int, vocabulary: int, **changes: Any) -> LogitEdits:
    """No edits; lists given for history, bias_ids and bias_values are per draw."""
    ragged = {
        name: [np.asarray(x) for x in changes.pop(name, [[]] * num_draws)]
        for name in ("history", "bias_ids", "bias_values")
    }
    starts = {
        name: np.cumsum([0, *map(len, ragged[name])]).astype(np.int32)
        for name in ("history", "bias_ids")
    }
    fields: dict[str, Any] = {
        "repetition": np.ones(num_draws, np.float32),
        "frequency": np.zeros(num_draws, np.float32),
        "presence": np.zeros(num_draws, np.float32),
        "num_prompt": np.zeros(num_draws, np.int32),
        "allowed": np.zeros((0, -(-vocabulary // 32)), np.uint32),
        "allowed_row": np.full(num_draws, -1, np.int32),
    }
    return LogitEdits(
        history=np.concatenate(ragged["history"]).astype(np.int32),
        history_start=starts["history"],
        bias_ids=np.concatenate(ragged["bias_ids"]).astype(np.int32),
        bias_values=np.concatenate(ragged["bias_values"]).astype(np.float32),
        bias_start=starts["bias_ids"],
        **(fields | changes),
    )


# --- the contract, slowly -------------------------------------------------------------------------


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, as its paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        low = 0xFFFFFFFF
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def slow_noise(batch: SamplingBatch, draw: int, token: int) -> float:
    seed = int(batch.rules["seed"][draw])
    counter = [int(batch.position[draw]), int(batch.rules["choice"][draw]), token // 4, 0]
    word = philox_words(counter, [seed & 0xFFFFFFFF, seed >> 32])[token % 4]
    uniform = np.float32(word >> 1) * np.float32(2**-31) + np.float32(2**-32)
    uniform = min(uniform, np.float32(1 - 2**-24))
    return float(-np.log(-np.log1p(-np.float64(uniform))))


def slow_edits(row: np.ndarray, edits: LogitEdits, draw: int) -> np.ndarray:
    row = row.astype(np.float64)
    if edits.allowed_row[draw] >= 0:
        mask = edits.allowed[edits.allowed_row[draw]]
        for t in range(len(row)):
            if not mask[t // 32] >> np.uint32(t % 32) & 1:
                row[t] = -np.inf
    for i in range(edits.bias_start[draw], edits.bias_start[draw + 1]):
        row[edits.bias_ids[i]] += edits.bias_values[i]
    history = edits.history[edits.history_start[draw] : edits.history_start[draw + 1]].tolist()
    output = history[edits.num_prompt[draw] :]
    for t in set(history):
        r = float(edits.repetition[draw])
        row[t] = row[t] / r if row[t] > 0 else row[t] * r
        row[t] -= float(edits.frequency[draw]) * output.count(t)
        row[t] -= float(edits.presence[draw]) * (t in output)
    return row


def slow_kept(row: np.ndarray, batch: SamplingBatch, draw: int) -> list[int]:
    """Tokens that the filters leave, in order."""
    rule = batch.rules[draw]
    scores = (row - row.max()) / float(rule["temperature"])
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))
    if rule["top_k"] > 0:
        order = order[: rule["top_k"]]
    weights = [np.exp(scores[t]) for t in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= float(rule["top_p"]) * sum(weights) and rule["top_p"] < 1:
            break
        kept.append(token)
        mass += weight
    return [t for t in kept if np.exp(scores[t]) >= float(rule["min_p"])]


def slow_totals(logits: np.ndarray, batch: SamplingBatch, draw: int) -> dict[int, float]:
    """Score plus noise of every token that may be drawn."""
    row = logits[batch.rows[draw]].astype(np.float64)
    if batch.edits is not None:
        row = slow_edits(row, batch.edits, draw)
    if batch.rules["temperature"][draw] == 0:
        best = int(row.argmax())
        return {best: 0.0}
    scores = (row - row.max()) / float(batch.rules["temperature"][draw])
    kept = slow_kept(row, batch, draw)
    return {t: scores[t] + slow_noise(batch, draw, t) for t in kept if np.isfinite(scores[t])}


def assert_drawn_by_the_contract(
    tokens: np.ndarray, logits: np.ndarray, batch: SamplingBatch
) -> None:
    for draw, token in enumerate(tokens.tolist()):
        totals = slow_totals(logits, batch, draw)
        assert token in totals, f"draw {draw}: {token} was filtered out"
        assert totals[token] >= max(totals.values()) - 1e-5


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # kat_vectors of Random123, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words) -> None:
    assert torch_sampler.philox(torch.tensor(counter), torch.tensor(key)).tolist() == words
    assert philox_words(counter, key) == words


def test_noise_is_finite_at_both_ends() -> None:
    """The largest word must not round to a uniform of 1, whose noise would always win."""
    noise = torch_sampler.gumbel(torch.tensor([0, 2, 2**31, 2**32 - 1]))
    assert noise.isfinite().all()
    assert noise[0] == pytest.approx(32 * np.log(2), abs=1e-5)
    assert noise[-1] == pytest.approx(-np.log(24 * np.log(2)), abs=1e-5)
    assert (noise.diff() < 0).all()


def test_noise_has_the_gumbel_distribution() -> None:
    batch = make_batch(4, seed=[1, 2, 3, 2**64 - 1])
    noise = torch_sampler.noise(batch, slice(0, 4), 50_000, torch.device("cpu")).double()
    # P(noise <= x) = exp(-exp(-x)): the probability transform is uniform
    uniform = (-(-noise).exp()).exp().flatten().numpy()
    counts, _ = np.histogram(uniform, bins=100, range=(0, 1))
    statistic = ((counts - 2000.0) ** 2 / 2000).sum()
    assert statistic < 161, "chi-square of 99 degrees, p = 1e-4"


# --- draws ----------------------------------------------------------------------------------------


@settings(
    max_examples=40,
    deadline=None,
    # a sampler has no state that one example could leave to the next
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_draws_follow_the_contract(data, sample) -> None:
    """Any filters, any edits, tied logits: the drawn token is one the slow reading allows."""
    vocabulary = data.draw(st.integers(1, 90), label="vocabulary")
    num_draws, num_rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    logits = rng.normal(size=(num_rows, vocabulary)).astype(np.float32) * 3
    if data.draw(st.booleans(), label="ties"):
        logits = logits.round()
    edits = None
    if data.draw(st.booleans(), label="edits"):
        lengths = rng.integers(0, 12, num_draws)
        biased = rng.integers(0, 5, num_draws)
        allowed = rng.integers(0, 2**32, (2, -(-vocabulary // 32)), np.uint32)
        allowed[:, 0] |= 1
        edits = make_edits(
            num_draws,
            vocabulary,
            repetition=rng.uniform(0.7, 1.6, num_draws).astype(np.float32),
            frequency=rng.uniform(-1, 1, num_draws).astype(np.float32),
            presence=rng.uniform(-1, 1, num_draws).astype(np.float32),
            history=[rng.integers(0, vocabulary, n) for n in lengths],
            num_prompt=(lengths // 2).astype(np.int32),
            bias_ids=[rng.integers(0, vocabulary, n) for n in biased],
            bias_values=[rng.normal(size=n) * 5 for n in biased],
            allowed=allowed,
            allowed_row=rng.integers(-1, 2, num_draws).astype(np.int32),
        )
    batch = make_batch(
        num_draws,
        rows=rng.integers(0, num_rows, num_draws),
        temperature=rng.choice([0, 0.3, 1, 1.7], num_draws),
        top_k=rng.choice([0, 1, 3, 10, 1000], num_draws),
        top_p=rng.choice([1, 0.97, 0.631, 0.05], num_draws),
        min_p=rng.choice([0, 0.0123, 0.37, 1], num_draws),
        seed=rng.integers(0, 2**64, num_draws, np.uint64),
        choice=rng.integers(0, 2**32, num_draws, np.uint32),
        position=rng.integers(0, 2**32, num_draws, np.uint32),
        edits=edits,
    )
    tokens = sample(logits, batch)
    assert_drawn_by_the_contract(tokens, logits, batch)


def random_batch(rng: np.random.Generator, num_draws: int, num_rows: int) -> SamplingBatch:
    return make_batch(
        num_draws,
        rows=rng.integers(0, num_rows, num_draws),
        temperature=rng.choice([0, 0.5, 1, 3], num_draws),
        top_k=rng.choice([0, 0, 1, 40, 2000], num_draws),
        top_p=rng.choice([1, 0.95, 0.5, 0.01], num_draws),
        min_p=rng.choice([0, 0, 0.05, 1], num_draws),
        seed=rng.integers(0, 2**64, num_draws, np.uint64),
        choice=rng.integers(0, 4, num_draws),
        position=rng.integers(0, 100_000, num_draws),
    )


@pytest.mark.parametrize("vocabulary", [1, 63, 8192, 8200, 152_064])
@pytest.mark.parametrize("scale", [0.5, 5])
def test_compiled_draws_equal_torchs(vocabulary, scale, cpu_samplers) -> None:
    """Equal tokens, or a near tie; and the same for every number of threads."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(4, vocabulary)).astype(np.float32) * np.float32(scale)
    logits[0] = logits[0].round()  # thousands of ties
    for num_draws in (1, 3, 12):
        batch = random_batch(rng, num_draws, 4)
        want = torch_sample(logits, batch)
        for sampler in cpu_samplers:
            got = sampler.sample(logits, batch)
            for draw in np.flatnonzero(got != want):
                assert batch.rules["temperature"][draw] > 0, "greedy draws are exactly equal"
                row = logits[batch.rows[draw]].astype(np.float64)
                totals = [
                    row[t] / float(batch.rules["temperature"][draw])
                    + slow_noise(batch, draw, int(t))
                    for t in (got[draw], want[draw])
                ]
                assert totals[0] == pytest.approx(totals[1], abs=1e-5)
            np.testing.assert_array_equal(got, cpu_samplers[0].sample(logits, batch))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_draws_the_same_tokens(isa, cpu_samplers, tmp_path) -> None:
    """Seeded so that no near tie is among them."""
    if isa not in cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    rng = np.random.default_rng(11)
    logits = rng.normal(size=(4, 10_001)).astype(np.float32) * 3
    batch = random_batch(rng, 60, 4)
    (tmp_path / "in").write_bytes(pickle.dumps((logits, batch)))
    script = """
import pickle, sys
from pathlib import Path
from quire.kernels import cpu
from quire.kernels.cpu.sampler import CpuSampler
logits, batch = pickle.loads(Path(sys.argv[1], "in").read_bytes())
assert cpu.isa().startswith(sys.argv[2])
tokens = CpuSampler(cpu.Team(2)).sample(logits, batch)
Path(sys.argv[1], "out").write_bytes(pickle.dumps(tokens))
"""
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), isa],
        env={**os.environ, "QUIRE_CPU_ISA": isa},
        check=True,
        timeout=60,
    )
    tokens = pickle.loads((tmp_path / "out").read_bytes())
    np.testing.assert_array_equal(tokens, torch_sample(logits, batch))


def test_compiled_edits_equal_torchs(cpu_samplers) -> None:
    rng = np.random.default_rng(3)
    vocabulary, num_draws = 20_000, 6
    logits = rng.normal(size=(2, vocabulary)).astype(np.float32) * 4
    edits = make_edits(
        num_draws,
        vocabulary,
        repetition=rng.uniform(0.7, 1.6, num_draws).astype(np.float32),
        frequency=rng.uniform(-1, 1, num_draws).astype(np.float32),
        presence=rng.uniform(-1, 1, num_draws).astype(np.float32),
        # ids outside the vocabulary are passed over
        history=[rng.integers(-2, vocabulary + 50, 3000) for _ in range(num_draws)],
        num_prompt=np.full(num_draws, 1000, np.int32),
        bias_ids=[rng.integers(0, vocabulary + 3, 300) for _ in range(num_draws)],
        bias_values=[rng.normal(size=300) * 5 for _ in range(num_draws)],
        allowed=rng.integers(0, 2**32, (3, vocabulary // 32), np.uint32),
        allowed_row=rng.integers(-1, 3, num_draws).astype(np.int32),
    )
    for temperature in (0, 1):
        batch = replace(random_batch(rng, num_draws, 2), edits=edits)
        batch.rules["temperature"] = temperature
        want = torch_sample(logits, batch)
        before = logits.copy()
        for sampler in cpu_samplers:
            np.testing.assert_array_equal(sampler.sample(logits, batch), want)
        np.testing.assert_array_equal(logits, before, "edits are over a private copy")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.06, 0.04]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.04, 0.0036, 0.0016]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 0.85}, [0.4, 0.3, 0.2, 0, 0]),
        ({"min_p": 0.12}, [0.4, 0.3, 0.2, 0.06, 0]),
        # top-p counts mass after top-k: 0.4 / 0.9 = 0.44 < 0.7 <= 0.78
        ({"top_k": 3, "top_p": 0.7}, [0.4, 0.3, 0, 0, 0]),
    ],
)
def test_draws_have_the_probabilities_asked_for(changes, expected, sample) -> None:
    """Chi-square over 10 000 positions; p = 1e-4 for the degrees of freedom there are."""
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = np.full((1, 70), -np.inf, np.float32)
    # spread over the words of several counters
    places = [1, 6, 11, 64, 69]
    logits[0, places] = np.log(probabilities)
    tokens = sample(logits, make_batch(10_000, seed=42, **changes))
    counts = np.bincount(tokens, minlength=70)[places]
    assert counts.sum() == 10_000
    expected = np.array(expected) / np.sum(expected) * 10_000
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    limit = {2: 15.2, 3: 18.5, 4: 21.2, 5: 23.6}[int(possible.sum())]
    assert statistic < limit


def test_seed_choice_and_position_each_change_the_draw(sample) -> None:
    logits = np.zeros((1, 50_000), np.float32)
    batch = make_batch(
        5, seed=[7, 8, 7, 7, 7 + 2**32], choice=[0, 0, 1, 0, 0], position=[5, 5, 5, 6, 5]
    )
    assert len(set(sample(logits, batch).tolist())) == 5


def test_a_draw_is_the_same_alone_and_in_any_batch(sample) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6, 9000)).astype(np.float32) * 3
    batch = random_batch(rng, 30, 6)
    tokens = sample(logits, batch)
    for draw in (0, 7, 29):
        only = slice(draw, draw + 1)
        alone = SamplingBatch(np.zeros(1, np.int32), batch.rules[only], batch.position[only])
        row = logits[batch.rows[draw]][None]
        assert sample(row, alone)[0] == tokens[draw]


def test_greedy_takes_the_lowest_of_equal_tokens(sample) -> None:
    logits = np.zeros((2, 20_000), np.float32)
    logits[0, [8191, 8192, 19_999]] = 3
    logits[1, :] = -0.0
    logits[1, 5:] = 0.0
    tokens = sample(logits, make_batch(3, rows=[0, 1, 0], temperature=[0, 0, 9e-6]))
    assert tokens.tolist() == [8191, 0, 8191]


def test_ties_at_a_filters_edge_go_to_the_lowest_ids(sample) -> None:
    logits = np.zeros((1, 300), np.float32)
    for changes in ({"top_k": 3}, {"top_p": 0.0099}):
        assert set(sample(logits, make_batch(200, **changes)).tolist()) == {0, 1, 2}


def test_a_low_temperature_keeps_its_precision(sample) -> None:
    """Scores of 2e6 would swallow the noise if they were not taken from the largest logit."""
    logits = np.full((1, 64), 19.0, np.float32)
    logits[0, [3, 60]] = 20.0
    tokens = sample(logits, make_batch(200, temperature=1e-5))
    assert set(tokens.tolist()) == {3, 60}


def test_nan_and_infinite_logits_cannot_take_a_batch_down(sample) -> None:
    logits = np.zeros((5, 100), np.float32)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, :] = np.nan
    logits[2, 42] = -5
    logits[3, 17] = np.inf
    rows = np.repeat(np.arange(5), 3)
    temperature, top_p = np.tile([0, 1, 1], 5), np.tile([1, 1, 0.9], 5)
    invalid = np.zeros(15, bool)
    tokens = sample(
        logits, make_batch(15, rows=rows, temperature=temperature, top_p=top_p), invalid
    )
    assert invalid.tolist() == [True] * 6 + [False] * 9
    assert tokens[:12].tolist() == [0] * 6 + [42] * 3 + [17] * 3


def test_everything_banned_is_flagged(sample) -> None:
    edits = make_edits(
        2, 40, allowed=np.zeros((1, 2), np.uint32), allowed_row=np.array([0, -1], np.int32)
    )
    invalid = np.zeros(2, bool)
    tokens = sample(np.ones((1, 40), np.float32), make_batch(2, edits=edits), invalid)
    assert invalid.tolist() == [True, False]
    assert tokens[0] == 0


# --- the binding ----------------------------------------------------------------------------------


def test_rows_may_be_padded(cpu_samplers) -> None:
    padded = np.zeros((3, 128), np.float32)
    padded[:, 100:] = 99
    padded[2, 7] = 1
    batch = make_batch(1, rows=2, temperature=0)
    assert cpu_samplers[0].sample(padded[:, :100], batch).tolist() == [7]


def test_logits_of_another_type_are_refused(cpu_samplers) -> None:
    with pytest.raises(ValueError, match="float32"):
        cpu_samplers[0].sample(np.zeros((1, 8), np.float64), make_batch(1))
    with pytest.raises(ValueError, match="contiguous"):
        cpu_samplers[0].sample(np.zeros((1, 16), np.float32)[:, ::2], make_batch(1))


def test_what_would_be_read_out_of_bounds_is_refused(cpu_samplers) -> None:
    logits = np.zeros((2, 8), np.float32)
    with pytest.raises(IndexError):
        cpu_samplers[0].sample(logits, make_batch(1, rows=2))
