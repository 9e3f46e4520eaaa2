"""`least_load`: the pod with the shortest queue, then the fewest streams. Blind to prefixes.

Filters and prefill pods as in `remote_prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.router.filters import DECODE_FILTERS
from quire.router.pickers import Lowest
from quire.router.policies.remote_prefill import RemoteForDecodeOnly
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints, Floats
    from quire.router.query import RouteQuery


@dataclass(frozen=True)
class Wait:
    """Seconds of prefill work in the queue."""

    name: str = "wait_s"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """The wait."""
        return pods.wait_s


@dataclass(frozen=True)
class Streams:
    """Streams in the batch, by the share of it that they fill."""

    name: str = "running_share"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """The share."""
        return pods.running / pods.max_seqs


LOAD = (Wait(), Streams())


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    profile = Profile(DECODE_FILTERS, LOAD, Lowest())
    return Policy("least_load", profile, RemoteForDecodeOnly(config.min_remote_prefill_tokens))
