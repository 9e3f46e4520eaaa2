"""Prefill pods for the policies that compare no costs: a decode-only pod gets the least busy one
that it can exchange blocks with.

A pod whose role has no prefilling gets a prefill pod for every prompt that is long enough; any
other pod prefills what it decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.router.filters import PREFILL_FILTERS
from quire.router.pickers import Lowest

if TYPE_CHECKING:
    import numpy as np

    from quire.router.endpoints import Endpoints, Flags
    from quire.router.query import RouteQuery


@dataclass(frozen=True)
class RemoteForDecodeOnly:
    """The prefill pod with the shortest queue, for decode pods that should not prefill."""

    min_tokens: int

    def choose(
        self, query: RouteQuery, pods: Endpoints, decode: int, rng: np.random.Generator
    ) -> int | None:
        """The prefill pod's slot; None to prefill on the decode pod."""
        short = query.prompt_len - pods.cached_tokens[decode] < self.min_tokens
        if pods.prefill_weight[decode] > 0 or short:
            return None
        kept: Flags = pods.kv_layout == pods.kv_layout[decode]
        for f in PREFILL_FILTERS:
            kept = f.keep(query, pods, kept)
        if not kept.any():
            return None
        return Lowest().pick((pods.wait_s,), kept, rng)
