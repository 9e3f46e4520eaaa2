"""The gateway's own metrics, as requests go through it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.gateway.trace import Trace
    from quire.gateway.worker import Loss
    from quire.telemetry.instruments import Instruments


class Traffic:
    """Instruments of the request path, looked up once."""

    def __init__(self, instruments: Instruments) -> None:
        get = instruments.get
        self.instruments = instruments
        self.in_flight = get(m.GATEWAY_IN_FLIGHT)
        self.open_streams = get(m.GATEWAY_OPEN_STREAMS)
        self.first_token = get(m.GATEWAY_TIME_TO_FIRST_TOKEN)
        self.inter_token = get(m.GATEWAY_INTER_TOKEN_LATENCY)
        self.tokenization = get(m.GATEWAY_TOKENIZATION)
        self.input_tokens = get(m.GATEWAY_INPUT_TOKENS)
        self.output_tokens = get(m.GATEWAY_OUTPUT_TOKENS)
        self._disconnects = get(m.GATEWAY_DISCONNECTS)
        self._changed_numerics = get(m.GATEWAY_CHANGED_NUMERICS)

    def start(self, trace: Trace) -> RequestClock:
        """A request was received."""
        return RequestClock(self, trace)

    def disconnected(self) -> None:
        """A client went away before its answer was complete."""
        self._disconnects.inc()

    def resubmitted(self, loss: Loss, same_bits: bool) -> None:
        """A request goes on, after its worker was lost or refused it."""
        self.instruments.get(m.GATEWAY_RESUBMISSIONS, loss.value).inc()
        if not same_bits:
            self._changed_numerics.inc()

    def failed(self, code: str) -> None:
        """A request ended in an error."""
        self.instruments.get(m.GATEWAY_ERRORS, code).inc()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A response was complete."""
        self.instruments.get(m.GATEWAY_REQUESTS, route, str(status)).inc()
        self.instruments.get(m.GATEWAY_REQUEST_DURATION, route).observe(seconds)


class RequestClock:
    """Times of one generation request."""

    __slots__ = ("_last", "_started", "_trace", "_traffic")

    def __init__(self, traffic: Traffic, trace: Trace) -> None:
        self._traffic = traffic
        self._trace = trace
        self._started = trace.watch.began
        self._last: dict[int, float] = {}  # choice -> time of its last tokens

    def tokenized(self, num_tokens: int) -> None:
        """The prompts are token ids now."""
        self._traffic.tokenization.observe(time.monotonic() - self._started)
        self._traffic.input_tokens.inc(num_tokens)

    def tokens(self, choice: int, count: int) -> None:
        """A choice has new tokens."""
        if not count:
            return
        now = time.monotonic()
        traffic, last = self._traffic, self._last
        if choice in last:
            traffic.inter_token.observe((now - last[choice]) / count, count)
        elif not last:
            traffic.first_token.observe(now - self._started)
        last[choice] = now
        traffic.output_tokens.inc(count)

    def handed_over(self) -> None:
        """What there is of the answer is with the client's connection, or kept for it."""
        if self._last:
            self._trace.first_token()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """The request is in progress."""
        self._traffic.in_flight.inc()
        try:
            yield
        finally:
            self._traffic.in_flight.dec()

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Its answer is streamed."""
        self._traffic.open_streams.inc()
        try:
            yield
        finally:
            self._traffic.open_streams.dec()
