"""`session`: requests of one session go to one pod, by rendezvous hashing.

Every replica computes the same pod without talking to the others, and when pods come or go only
the sessions of those pods move. A request without a session is one of its prompt's first block.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from quire.api.block_hash import HASH_BYTES
from quire.router.filters import DECODE_FILTERS
from quire.router.pickers import Lowest
from quire.router.policies.remote_prefill import RemoteForDecodeOnly
from quire.router.profile import Policy, Profile

if TYPE_CHECKING:
    from quire.config.router import RouterConfig
    from quire.router.endpoints import Endpoints, Floats
    from quire.router.query import RouteQuery


@dataclass(frozen=True)
class Rendezvous:
    """A random number per (session, pod) that everybody computes alike."""

    name: str = "rendezvous"

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """The numbers, in [0, 1)."""
        first = query.hashes[:HASH_BYTES] or query.request_id.encode()
        key = blake2b(query.session.encode() or first, digest_size=32).digest()
        numbers = [
            int.from_bytes(blake2b(pod.encode(), digest_size=8, key=key).digest(), "little")
            for pod in pods.pods
        ]
        return np.array(numbers, np.float64) / 2.0**64


def build(config: RouterConfig) -> Policy:
    """The pipeline."""
    profile = Profile(DECODE_FILTERS, (Rendezvous(),), Lowest())
    return Policy("session", profile, RemoteForDecodeOnly(config.min_remote_prefill_tokens))
