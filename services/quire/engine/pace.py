"""How fast this engine is: moving averages that routers price a placement with.

A step of `T` seconds computes prompt chunks and one token for each of `d` decoding streams:

    prefill rate   sum of prompt tokens / sum of T, over steps with prompt tokens
    ITL            sum of d * T / sum of d
    ITL slope      least squares of T over d, over steps without prompt tokens

Sums decay with busy time, so that an idle hour forgets nothing and a busy minute forgets the past.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 10.0
"""Busy seconds after which a step counts 1/e."""
MIN_SPREAD = 0.25
"""Variance of the batch size below which a slope would be noise."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured; 0 where nothing was."""

    prefill_tokens_per_s: float
    itl_s: float
    itl_slope_s: float
    """Growth of ITL with each further stream in the batch."""


class Pace:
    """Takes in steps, gives rates. Constant work per step."""

    def __init__(self) -> None:
        self._prefill_tokens = self._prefill_s = 0.0
        self._streams = self._stream_s = 0.0
        # decayed sums over decode-only steps: 1, d, T, d * T, d * d
        self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)

    def note_step(self, decodes: int, prompt: int, duration_s: float) -> None:
        """A finished step: sequences that got one token, tokens of prompts, how long it took."""
        keep = math.exp(-duration_s / MEMORY_S)
        if prompt:
            self._prefill_tokens = self._prefill_tokens * keep + prompt
            self._prefill_s = self._prefill_s * keep + duration_s
        if decodes:
            self._streams = self._streams * keep + decodes
            self._stream_s = self._stream_s * keep + decodes * duration_s
            if not prompt:
                d, t = float(decodes), duration_s
                seen = (1.0, d, t, d * t, d * d)
                sums = zip(self._moments, seen, strict=True)
                n, sd, st, sdt, sdd = (m * keep + x for m, x in sums)
                self._moments = (n, sd, st, sdt, sdd)

    def rates(self) -> Rates:
        """The averages now."""
        return Rates(
            prefill_tokens_per_s=_ratio(self._prefill_tokens, self._prefill_s),
            itl_s=_ratio(self._stream_s, self._streams),
            itl_slope_s=self._slope(),
        )

    def _slope(self) -> float:
        n, sd, st, sdt, sdd = self._moments
        spread = n * sdd - sd * sd
        if n == 0 or spread < MIN_SPREAD * n * n:
            return 0.0
        return max((n * sdt - sd * st) / spread, 0.0)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0
