"""`round_robin`: each pod in turn. Blind to everything; what a plain load balancer does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.router.filters import DECODE_FILTERS
from quire.router.pickers import Next
from quire.router.policies.remote_prefill import RemoteForDecodeOnly
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    profile = Profile(DECODE_FILTERS, (), Next())
    return Policy("round_robin", profile, RemoteForDecodeOnly(config.min_remote_prefill_tokens))
