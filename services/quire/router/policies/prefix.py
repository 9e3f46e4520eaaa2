"""`prefix`: the pod that holds most of the prompt, then the least loaded. Blind to what load costs.

Kept for comparison: as soon as all prompts begin alike, the first pod that got one gets them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.router.filters import DECODE_FILTERS
from quire.router.pickers import Lowest
from quire.router.policies.least_load import LOAD
from quire.router.policies.remote_prefill import RemoteForDecodeOnly
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints, Floats
    from quire.router.query import RouteQuery


@dataclass(frozen=True)
class Uncached:
    """Prompt tokens that would have to be computed."""

    name: str = "uncached_tokens"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """The tokens."""
        return query.prompt_len - pods.cached_tokens


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    profile = Profile(DECODE_FILTERS, (Uncached(), *LOAD), Lowest())
    return Policy("prefix", profile, RemoteForDecodeOnly(config.min_remote_prefill_tokens))
