"""Measured rates: what a router will price a placement with."""

from __future__ import annotations

import pytest

from quire.engine.pace import Pace


def test_nothing_measured_is_zero() -> None:
    rates = Pace().rates()
    assert (rates.prefill_tokens_per_s, rates.itl_s, rates.itl_slope_s) == (0.0, 0.0, 0.0)


def test_the_prefill_rate_is_tokens_over_time() -> None:
    pace = Pace()
    for _ in range(5):
        pace.note_step(2, 512, 0.1)
    assert pace.rates().prefill_tokens_per_s == pytest.approx(5120)


def test_the_slope_is_the_growth_with_the_batch() -> None:
    pace = Pace()
    for streams in (1, 4, 8, 2, 16):
        pace.note_step(streams, 0, 0.01 + 0.001 * streams)
    assert pace.rates().itl_slope_s == pytest.approx(0.001, rel=1e-3)


def test_one_batch_size_gives_no_slope() -> None:
    pace = Pace()
    for _ in range(9):
        pace.note_step(4, 0, 0.02)
    assert pace.rates().itl_slope_s == 0.0
    assert pace.rates().itl_s == pytest.approx(0.02)
