"""A dying engine is started again soon, then less and less often."""

from __future__ import annotations

from quire.coordinator.back_off import next_delay_s


def test_delays_double_up_to_a_limit_and_start_over_after_a_calm_minute():
    delays = [0.0]
    for _ in range(8):
        delays.append(next_delay_s(delays[-1], was_well_s=1.0))
    assert delays[1:] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert next_delay_s(30.0, was_well_s=61.0) == 0.5
