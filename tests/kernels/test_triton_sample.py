"""Draws of the Triton sampler are those of the torch sampler, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from quire.kernels import torch_sampler  # noqa: E402
from quire.kernels.sampling import DRAW_RULE, SamplingBatch  # noqa: E402
from quire.kernels.triton import sample  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# where there is a GPU, these are its tests
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
INF = float("inf")


def batch(count: int, rows: int, seed: int = 0) -> SamplingBatch:
    """Draws with large seeds and positions, greedy ones among them."""
    rng = np.random.default_rng(seed)
    temperature = rng.choice([0.0, 1e-6, 0.3, 0.7, 1.0, 1.3, 5.0], count)
    rules = np.zeros(count, DRAW_RULE)
    at = rng.integers(0, rows, count).astype(np.int32)
    rules["temperature"], rules["top_p"] = temperature, 1
    rules["seed"] = rng.integers(0, 2**64, count, np.uint64)
    rules["choice"] = rng.integers(0, 2**32, count, np.uint32)
    return SamplingBatch(at, rules, rng.integers(0, 2**32, count, np.uint32))


def check(logits: torch.Tensor, draws: SamplingBatch) -> torch.Tensor:
    got = sample.draw(logits.to(DEVICE), draws).cpu()
    assert torch.equal(got, torch_sampler.draw(logits, draws))
    return got


@pytest.mark.parametrize("vocabulary", [1, 307, 5000])
def test_draws_are_the_reference_s(vocabulary) -> None:
    """Near-flat logits, so that the noise decides; float32 rows, and a slice of wider ones."""
    logits = torch.randn(5, vocabulary + 3) / 4
    check(logits[:, :vocabulary], batch(12, 5))


def test_noise_is_the_reference_s_bit_for_bit() -> None:
    """A logit ahead by a hair more than the noise is behind: any wrong bit shows in some draw."""
    draws = replace(batch(64, 1), rows=np.arange(64, dtype=np.int32))
    draws.rules["temperature"] = 1
    noise = torch_sampler.noise(draws, slice(0, 64), 40, torch.device("cpu"))
    # token 0 scores exactly as token 1 does, or one float32 step above or below
    ahead = noise[:, 1:2] - noise[:, :1]
    for step in (-INF, None, INF):
        logits = torch.full((64, 40), -1e4)
        first = ahead if step is None else torch.nextafter(ahead, torch.full_like(ahead, step))
        logits[:, 0:1], logits[:, 1] = first, 0.0
        check(logits, draws)


def test_ties_go_to_the_lowest_token_across_programs() -> None:
    vocabulary = 3 * sample.BLOCK
    logits = torch.zeros(2, vocabulary)
    logits[0, [2000, 2001, 3000]] = 1.0
    greedy = replace(batch(2, 1), rows=np.array([0, 1], np.int32))
    greedy.rules["temperature"] = 0
    assert check(logits, greedy)[0].tolist() == [2000, 0]


def test_what_is_no_number_is_not_drawn() -> None:
    logits = torch.randn(4, 100)
    logits[0] = float("nan")
    logits[1] = -INF
    logits[2, 50:] = float("nan")
    logits[2, 7] = INF
    logits[3] = -INF
    logits[3, 99] = -3.0
    for temperature in (0.0, 1.0):
        draws = replace(batch(4, 1), rows=np.arange(4, dtype=np.int32))
        draws.rules["temperature"] = temperature
        got = check(logits, draws)
        assert got[1].tolist() == [1, 1, 0, 0]
        assert got[0].tolist() == [0, 0, 7, 99]


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("top_p", 0.9), ("min_p", 0.1)])
def test_batches_with_filters_are_not_plain(name, value) -> None:
    draws = batch(3, 1)
    assert sample.is_plain(draws)
    draws.rules[name][1] = value
    assert not sample.is_plain(draws)
