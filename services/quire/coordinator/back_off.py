"""How long to wait before something that has ended is started again."""

from __future__ import annotations

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
CALM_S = 60.0


def next_delay_s(delay_s: float, was_well_s: float) -> float:
    """After what had been waited `delay_s` for and then was well for `was_well_s`."""
    if was_well_s >= CALM_S:
        return FIRST_DELAY_S
    return min(max(2 * delay_s, FIRST_DELAY_S), LONGEST_DELAY_S)
