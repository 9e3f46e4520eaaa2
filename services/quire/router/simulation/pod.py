"""A modelled engine: chunked prefill in the running batch, first come first served.

    submit -> waiting -> (match cache, take blocks) -> prefilling, chunk by chunk
           -> first token -> decoding, one token a step -> done, blocks given back

A step takes  step_s + step_s_per_stream * decoding streams + chunk tokens / prefill rate.  Steps
without a prompt chunk are alike until a stream ends, so they are modelled as one span, cut short
when a request arrives.

A prompt that another pod computes is submitted there with one output token; `on_first_token` hands
it over, and `submit_prefilled` lets it join the batch here, without a chunk:

    submit_prefilled -> waiting -> (match cache, take blocks) -> decoding -> done
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.router.reports import LoadReport
from quire.router.simulation.cache import ModelCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.router.simulation.clock import Timer, VirtualClock


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """How fast and how large a modelled engine is. Defaults: an 8 B model on one large GPU."""

    prefill_tokens_per_s: float = 10_000.0
    step_s: float = 0.012
    step_s_per_stream: float = 0.0002
    chunk_tokens: int = 2048
    max_seqs: int = 128
    block_size: int = 512
    cache_blocks: int = 2000
    bytes_per_token: float = 131072.0
    """Of keys and values, for transfers between pods."""
    transfer_bytes_per_s: float = 1e9
    """The router's own prior: modelled pods report no measured rates of pairs."""


@dataclass(eq=False)
class ModelRequest:
    """One request's way through a modelled engine."""

    hashes: Sequence[bytes]
    prompt_len: int
    output_len: int
    arrival: float
    cached_tokens: int = 0
    computed: int = 0
    """Prompt tokens in the cache."""
    named: int = 0
    """Leading blocks known under their hashes."""
    left: int = 0
    """Output tokens still to come."""
    first_token: float = math.nan
    done: float = math.nan
    num_blocks: int = 0
    on_first_token: Callable[[], None] | None = None
    is_prefilled: bool = False
    """Its prompt comes from another pod."""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_token - self.arrival

    @property
    def itl_s(self) -> float:
        """Mean seconds per token after the first; 0 when there is no second."""
        return (self.done - self.first_token) / max(self.output_len - 1, 1)


class ModelPod:
    """One modelled engine on a virtual clock."""

    def __init__(self, name: str, model: EngineModel, clock: VirtualClock) -> None:
        self.name, self.model = name, model
        self.cache = ModelCache(model.cache_blocks)
        self.waiting: deque[ModelRequest] = deque()
        self.prefilling: deque[ModelRequest] = deque()
        self.decoding: list[ModelRequest] = []
        self._clock = clock
        self._timer: Timer | None = None
        self._span_start = 0.0
        self._span_step_s = 0.0
        """Length of each step of the span in progress; 0 while a prompt chunk is computed."""

    def submit(self, request: ModelRequest) -> None:
        """A request arrives."""
        self.waiting.append(request)
        if self._timer is None:
            self._start_step()
        elif self._span_step_s:  # decoding only: it joins after the step in progress
            elapsed = self._clock.now - self._span_start
            steps = max(math.ceil(elapsed / self._span_step_s), 1)
            self._timer.cancelled = True
            end = self._span_start + steps * self._span_step_s
            self._timer = self._clock.at(end, lambda: self._end_span(steps))

    def submit_prefilled(self, request: ModelRequest) -> None:
        """A request whose prompt and first token another pod has computed arrives with them."""
        request.is_prefilled = True
        request.left = request.output_len - 1
        self.submit(request)

    def load(self) -> LoadReport:
        """What the engine reports."""
        model = self.model
        streams = len(self.decoding)
        return LoadReport(
            running=streams + len(self.prefilling),
            waiting=len(self.waiting),
            waiting_tokens=sum(r.prompt_len for r in self.waiting),
            prefilling_tokens=sum(r.prompt_len - r.computed for r in self.prefilling),
            blocks_free=self.cache.num_free,
            blocks_cached=self.cache.num_idle,
            prefill_tokens_per_s=model.prefill_tokens_per_s,
            itl_s=model.step_s + model.step_s_per_stream * max(streams, 1),
            itl_slope_s=model.step_s_per_stream,
        )

    # ---- steps

    def _start_step(self) -> None:
        self._admit()
        model = self.model
        step_s = model.step_s + model.step_s_per_stream * len(self.decoding)
        if self.prefilling:
            request = self.prefilling[0]
            tokens = min(model.chunk_tokens, request.prompt_len - request.computed)
            end = self._clock.now + step_s + tokens / model.prefill_tokens_per_s
            self._span_step_s = 0.0
            self._timer = self._clock.at(end, lambda: self._end_chunk(request, tokens))
        elif self.decoding:
            steps = min(r.left for r in self.decoding)
            self._span_start, self._span_step_s = self._clock.now, step_s
            end = self._clock.now + steps * step_s
            self._timer = self._clock.at(end, lambda: self._end_span(steps))
        else:
            self._timer = None

    def _admit(self) -> None:
        while self.waiting and len(self.decoding) + len(self.prefilling) < self.model.max_seqs:
            request, size = self.waiting[0], self.model.block_size
            usable = (request.prompt_len - 1) // size  # the last token is always computed
            matched = self.cache.match(request.hashes[:usable])
            self.cache.acquire(request.hashes[:matched])
            total = -(-(request.prompt_len + request.output_len) // size)
            if not self.cache.take(total - matched, self._clock.now):
                self.cache.release(request.hashes[:matched], 0)
                return
            self.waiting.popleft()
            request.named, request.num_blocks = matched, total
            if request.is_prefilled:
                self._join(request)
            else:
                request.cached_tokens = request.computed = matched * size
                self.prefilling.append(request)

    def _join(self, request: ModelRequest) -> None:
        """All of the prompt's blocks are here at once."""
        request.computed = request.prompt_len
        for h in request.hashes[request.named : request.prompt_len // self.model.block_size]:
            self.cache.name(h, self._clock.now)
            request.named += 1
        if request.left > 0:
            self.decoding.append(request)
        else:
            self._finish(request)

    def _end_chunk(self, request: ModelRequest, tokens: int) -> None:
        now = self._clock.now
        self._advance(1)
        request.computed += tokens
        for h in request.hashes[request.named : request.computed // self.model.block_size]:
            self.cache.name(h, now)
            request.named += 1
        if request.computed == request.prompt_len:
            self.prefilling.popleft()
            request.first_token = now
            request.left = request.output_len - 1
            if request.on_first_token is not None:
                request.on_first_token()
            if request.left > 0:
                self.decoding.append(request)
            else:
                self._finish(request)
        self._start_step()

    def _end_span(self, steps: int) -> None:
        self._advance(steps)
        self._start_step()

    def _advance(self, steps: int) -> None:
        for request in self.decoding:
            request.left -= steps
        for request in [r for r in self.decoding if r.left <= 0]:
            self.decoding.remove(request)
            self._finish(request)

    def _finish(self, request: ModelRequest) -> None:
        request.done = self._clock.now
        named = request.hashes[: request.named]
        self.cache.release(named, request.num_blocks - request.named)
