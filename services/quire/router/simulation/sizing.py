"""How many pods a trace needs: the smallest fleet whose replay keeps an objective.

Each candidate fleet replays the whole trace through the product's router. Fleets of equal pods are
searched by doubling, then halving the gap. Of prefill and decode pods, both are doubled until the
objective is met, then each is brought down in turn until neither can lose one, nor can two of one
kind be given for one of the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from quire.router.simulation.replay import FleetShape, Replay, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.config.router import RouterConfig
    from quire.router.simulation.pod import EngineModel, ModelRequest

NEVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A share of the requests stays within both limits."""

    ttft_s: float
    itl_s: float
    """Of a request's mean time between tokens."""
    share: float = 0.99

    def attained(self, requests: Sequence[ModelRequest]) -> float:
        """Share of the requests within both."""
        good = sum(r.ttft_s <= self.ttft_s and r.itl_s <= self.itl_s for r in requests)
        return good / len(requests)


class Sizing:
    """The search for one trace, engine and objective. Replays are remembered in `tried`."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        config: RouterConfig,
        model: EngineModel,
        objective: Objective,
    ) -> None:
        self._trace, self._config = trace, config
        self._model, self._objective = model, objective
        self.tried: dict[FleetShape, float] = {}
        """Fleet -> share of the requests within the objective."""

    def attained(self, shape: FleetShape) -> float:
        """Replay, once per fleet."""
        if shape not in self.tried:
            config = self._config
            if shape.both:  # equal pods prefill what they decode
                config = replace(config, min_remote_prefill_tokens=NEVER)
            result = Replay(self._trace, config, self._model, shape).run()
            self.tried[shape] = self._objective.attained(result.requests)
        return self.tried[shape]

    def is_enough(self, shape: FleetShape) -> bool:
        """The objective is kept."""
        return self.attained(shape) >= self._objective.share

    def aggregated(self, max_pods: int) -> FleetShape | None:
        """The smallest fleet of equal pods; None when `max_pods` are too few."""
        count = _least(lambda n: self.is_enough(FleetShape(both=n)), max_pods)
        return None if count is None else FleetShape(both=count)

    def disaggregated(self, max_pods: int) -> FleetShape | None:
        """A smallest fleet of prefill and decode pods; None when `max_pods` are too few."""
        half = _least_doubling(
            lambda n: self.is_enough(FleetShape(prefill=n, decode=n)), max(max_pods // 2, 1)
        )
        if half is None:
            return None
        shape = FleetShape(prefill=half, decode=half)
        while True:
            shape = self._shrunk(shape, "prefill")
            shape = self._shrunk(shape, "decode")
            smaller = next(filter(self.is_enough, _exchanges(shape)), None)
            if smaller is None:
                return shape
            shape = smaller

    def _shrunk(self, shape: FleetShape, kind: Literal["prefill", "decode"]) -> FleetShape:
        """As few pods of one kind as are enough."""

        def enough(count: int) -> bool:
            return self.is_enough(replace(shape, **{kind: count}))

        now = shape.prefill if kind == "prefill" else shape.decode
        return replace(shape, **{kind: _least(enough, now) or now})


def _exchanges(shape: FleetShape) -> list[FleetShape]:
    """Fleets smaller by one pod that have one more of a kind and two fewer of the other."""
    p, d = shape.prefill, shape.decode
    pairs = [(p + 1, d - 2), (p - 2, d + 1)]
    return [FleetShape(prefill=a, decode=b) for a, b in pairs if a > 0 and b > 0]


def _least_doubling(is_enough: Callable[[int], bool], limit: int) -> int | None:
    """1, 2, 4, ... and `limit`: the first that is enough."""
    count = 1
    while not is_enough(count):
        if count == limit:
            return None
        count = min(2 * count, limit)
    return count


def _least(is_enough: Callable[[int], bool], limit: int) -> int | None:
    """The least number up to `limit` that is enough, taking it that more is enough too."""
    high = _least_doubling(is_enough, limit)
    if high is None:
        return None
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def overlay(trace: Sequence[TraceRequest], copies: int, seed: int = 0) -> list[TraceRequest]:
    """The trace so many times at once: each copy shifted, wrapping round, with prefixes of its
    own, as that many groups of users would be."""
    rng = random.Random(seed)
    span = max(r.arrival_s for r in trace) + 1e-3
    made = list(trace)
    for copy in range(1, copies):
        shift, salt = rng.uniform(0, span), copy.to_bytes(8, "little")
        for r in trace:
            hashes = tuple(blake2b(h, digest_size=16, salt=salt).digest() for h in r.hashes)
            made.append(replace(r, arrival_s=(r.arrival_s + shift) % span, hashes=hashes))
    return sorted(made, key=lambda r: r.arrival_s)
