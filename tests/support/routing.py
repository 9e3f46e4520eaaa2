"""Routers, pods and queries with defaults that tests override."""

from __future__ import annotations

from typing import Any

from quire.api import block_hash
from quire.config.router import RouterConfig
from quire.router.query import RouteQuery
from quire.router.reports import LoadReport, PodModel
from quire.router.router import Router

ROOT = block_hash.root(b"model")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def chain(*blocks: int) -> list[bytes]:
    """Hashes of a chain of blocks, each filled with one token id."""
    return block_hash.extend(ROOT, [t for b in blocks for t in [b] * 16])


def make_query(*blocks: int, tail: int = 1, **fields: Any) -> RouteQuery:
    """A prompt of these blocks and `tail` more tokens."""
    hashes = b"".join(chain(*blocks))
    return RouteQuery(**{"hashes": hashes, "prompt_len": 16 * len(blocks) + tail} | fields)


def make_router(pods: int = 3, clock: Clock | None = None, **options: Any) -> Router:
    """A router with pods p0, p1, ... that have reported 1000 prompt tokens per second."""
    clock = clock or Clock()
    router = Router(RouterConfig(**{"routing_seed": 0} | options), clock=clock)
    for i in range(pods):
        add_pod(router, f"p{i}")
    return router


def add_pod(router: Router, pod: str, model: dict[str, Any] | None = None, **load: Any) -> None:
    """A pod with an empty cache that has reported its load."""
    router.fleet.connect(PodModel(**{"pod": pod, "incarnation": 1} | (model or {})), router.clock())
    report(router, pod, **load)


def report(router: Router, pod: str, **load: Any) -> None:
    """A pod's load report."""
    fields = {"prefill_tokens_per_s": 1000.0, "itl_s": 0.02, "itl_slope_s": 0.0005} | load
    router.fleet.report(pod, LoadReport(**fields), router.clock())


def cache(router: Router, pod: str, *blocks: int) -> None:
    """The pod holds exactly this chain."""
    router.fleet.stored(router.fleet.pods[pod], chain(*blocks))
