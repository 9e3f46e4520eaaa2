"""`power_of_two`: the less loaded of two random pods. Blind to prefixes; robust to stale loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.router.filters import DECODE_FILTERS
from quire.router.pickers import LowestOfTwo
from quire.router.policies.least_load import LOAD
from quire.router.policies.remote_prefill import RemoteForDecodeOnly
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    profile = Profile(DECODE_FILTERS, LOAD, LowestOfTwo())
    return Policy("power_of_two", profile, RemoteForDecodeOnly(config.min_remote_prefill_tokens))
