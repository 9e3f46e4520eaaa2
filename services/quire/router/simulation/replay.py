"""Replays a trace through a router and modelled pods: hit rates and times to first token.

The router is the product's own, told what real pods would tell it: cache events with the delay of
their stream, load reports once a second, cached tokens when a request is prefilled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from quire.router.query import RouteQuery
from quire.router.reports import PodModel
from quire.router.router import Router
from quire.router.simulation.clock import VirtualClock
from quire.router.simulation.pod import EngineModel, ModelPod, ModelRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from quire.config.router import RouterConfig
    from quire.router.decisions import Decision

REPORT_PERIOD_S = 1.0
EVENT_DELAY_S = 0.05
TRACE_BLOCK = 512
"""Tokens that one hash id of a trace stands for."""


@dataclass(frozen=True)
class TraceRequest:
    """One line of a trace."""

    arrival_s: float
    prompt_len: int
    output_len: int
    hashes: tuple[bytes, ...]
    """Of the full blocks."""


def read_trace(path: Path, speed: float = 1.0) -> list[TraceRequest]:
    """A Mooncake-format trace: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    The last, partly filled block's id is left out: caches hold full blocks.
    """
    requests = []
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            full = row["hash_ids"][: row["input_length"] // TRACE_BLOCK]
            requests.append(
                TraceRequest(
                    arrival_s=row["timestamp"] / 1000 / speed,
                    prompt_len=max(row["input_length"], 1),
                    output_len=max(row["output_length"], 1),
                    hashes=tuple(_hash_of(i) for i in full),
                )
            )
    return requests


def infinite_cache_hit_rate(trace: Iterable[TraceRequest]) -> float:
    """Cached share of the prompt tokens if one cache kept everything: the ceiling."""
    seen: set[bytes] = set()
    hits = total = 0
    for request in trace:
        usable = request.hashes[: (request.prompt_len - 1) // TRACE_BLOCK]
        depth = next((i for i, h in enumerate(usable) if h not in seen), len(usable))
        hits += depth * TRACE_BLOCK
        total += request.prompt_len
        seen.update(request.hashes)
    return hits / total if total else 0.0


@dataclass(frozen=True)
class ReplayResult:
    """What a replay gave."""

    requests: Sequence[ModelRequest]
    decisions: Sequence[Decision]

    @property
    def hit_rate(self) -> float:
        """Cached share of all prompt tokens."""
        prompt = sum(r.prompt_len for r in self.requests)
        return sum(r.cached_tokens for r in self.requests) / prompt

    @property
    def prediction_error(self) -> float:
        """Mean absolute error of the expected cached tokens, as a share of the prompt tokens."""
        pairs = zip(self.decisions, self.requests, strict=True)
        error = sum(abs(d.expected_cached_tokens - r.cached_tokens) for d, r in pairs)
        return error / sum(r.prompt_len for r in self.requests)

    def ttft_s(self) -> dict[str, float]:
        """Mean, median and 99th percentile of the time to first token."""
        times = np.array([r.first_token - r.arrival for r in self.requests])
        return {
            "mean": float(times.mean()),
            "p50": float(np.percentile(times, 50)),
            "p99": float(np.percentile(times, 99)),
        }


@dataclass(frozen=True)
class FleetShape:
    """How many pods of which role: equal ones that do both, or prefill pods beside decode pods."""

    both: int = 0
    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.both + self.prefill + self.decode

    def roles(self) -> dict[str, tuple[float, float]]:
        """Pod -> its weights for prefill and decode."""
        groups = (
            ("pod", self.both, (1.0, 1.0)),
            ("prefill", self.prefill, (1.0, 0.0)),
            ("decode", self.decode, (0.0, 1.0)),
        )
        return {f"{name}-{i}": weights for name, count, weights in groups for i in range(count)}


class Replay:
    """One run: a trace, a policy, pods of one engine model."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        config: RouterConfig,
        model: EngineModel,
        pods: int | FleetShape,
    ) -> None:
        shape = FleetShape(both=pods) if isinstance(pods, int) else pods
        self._trace, self._model, self._roles = trace, model, shape.roles()
        self._clock = VirtualClock()
        self._router = Router(config, clock=self._clock)
        self._pods = {name: ModelPod(name, model, self._clock) for name in self._roles}
        self._requests: list[ModelRequest] = []
        self._decisions: list[Decision] = []
        self._observed = 0
        for name in self._pods:
            self._router.fleet.connect(
                PodModel(
                    pod=name,
                    block_size=model.block_size,
                    num_blocks=model.cache_blocks,
                    block_bytes=int(model.bytes_per_token * model.block_size),
                    max_num_seqs=model.max_seqs,
                ),
                0.0,
            )

    def run(self) -> ReplayResult:
        """Replay to the end."""
        last = self._trace[-1].arrival_s
        for second in range(int(last / REPORT_PERIOD_S) + 2):
            self._clock.at(second * REPORT_PERIOD_S, self._report)
        for request in self._trace:
            self._clock.at(request.arrival_s, partial(self._arrive, request))
        self._clock.run()
        return ReplayResult(self._requests, self._decisions)

    def _report(self) -> None:
        for name, pod in self._pods.items():
            prefill, decode = self._roles[name]
            load = replace(pod.load(), prefill_weight=prefill, decode_weight=decode)
            self._router.fleet.report(name, load, self._clock.now)

    def _arrive(self, traced: TraceRequest) -> None:
        self._deliver_events()
        query = RouteQuery(
            hashes=b"".join(traced.hashes),
            prompt_len=traced.prompt_len,
            expected_output=traced.output_len,
        )
        decision = self._router.route(query)
        request = ModelRequest(traced.hashes, traced.prompt_len, traced.output_len, self._clock.now)
        self._requests.append(request)
        self._decisions.append(decision)
        decode = self._pods[decision.decode_pod]
        if decision.prefill_pod is None:
            decode.submit(request)
        else:
            self._prefill_elsewhere(request, self._pods[decision.prefill_pod], decode)

    def _prefill_elsewhere(
        self, request: ModelRequest, prefill: ModelPod, decode: ModelPod
    ) -> None:
        """Blocks travel while the next chunk is computed: what counts is the last chunk's."""
        model = self._model
        exported = ModelRequest(request.hashes, request.prompt_len, 1, request.arrival)
        last = min(request.prompt_len, model.chunk_tokens) * model.bytes_per_token
        exposed_s = last / model.transfer_bytes_per_s

        def arrive() -> None:
            request.first_token = self._clock.now
            decode.submit_prefilled(request)

        def hand_over() -> None:
            request.cached_tokens = exported.cached_tokens
            self._clock.at(self._clock.now + exposed_s, arrive)

        exported.on_first_token = hand_over
        prefill.submit(exported)

    def _deliver_events(self) -> None:
        """Cache events that had the time to arrive; nobody reads the index between decisions."""
        index, until = self._router.fleet.index, self._clock.now - EVENT_DELAY_S
        for name, pod in self._pods.items():
            if not pod.cache.changes:
                continue
            slot, changes = self._router.fleet.pods[name].slot, pod.cache.changes
            count = 0
            for change in changes:
                if change.at > until:
                    break
                (index.store if change.stored else index.remove)(slot, change.block_hash)
                count += 1
            del changes[:count]
            self._router.fleet.hear(name, self._clock.now)


def _hash_of(hash_id: int) -> bytes:
    return blake2b(hash_id.to_bytes(8, "little"), digest_size=16).digest()
