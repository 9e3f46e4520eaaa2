"""Endpoints for tests: a pool with known bytes, and what happened to every block."""

from __future__ import annotations

import threading
import time

import numpy as np

from quire.config.transfer import TransferConfig
from quire.transfer.endpoint import Endpoint
from quire.transfer.layout import BlockLayout, Shard, block_bytes
from quire.transfer.memory import PoolMemory
from quire.transfer.negotiate import Identity
from quire.transfer.state import Delivered, Ended, Released, new_number

LAYOUT = BlockLayout("tiny", "bfloat16", 16, num_layers=4, num_kv_heads=4, head_dim=32)
WHOLE = Shard()
QUICK = {"kv_lease_s": 1.0, "kv_heartbeat_s": 0.1, "kv_connect_timeout_s": 3.0}


def config(**changes):
    return TransferConfig(**{**QUICK, "kv_transports": ("tcp",), **changes})


class Side:
    """An endpoint with its pool and everything that it said."""

    def __init__(self, *, num_blocks=64, layout=LAYOUT, shard=WHOLE, seed=0, **options):
        transports = options.pop("transports", None)
        size = block_bytes(layout, shard)
        rng = np.random.default_rng(seed)
        self.pool = rng.integers(0, 256, (num_blocks, size), dtype=np.uint8)
        self.events = []
        self._changed = threading.Condition()
        settings = options.pop("config", None) or config(**options)
        identity = Identity(
            layout, shard, f"pod-{seed}", new_number(), settings.kv_heartbeat_s,
            settings.cluster_token or "",
        )  # fmt: skip
        memory = PoolMemory(self.pool, size)
        self.endpoint = Endpoint(settings, identity, memory, self._note, transports)
        self.peer = None

    def __enter__(self):
        self.peer = self.endpoint.start()
        return self

    def __exit__(self, *_):
        self.endpoint.close()

    def _note(self, event):
        with self._changed:
            self.events.append((time.monotonic(), event))
            self._changed.notify_all()

    def wait(self, found, timeout_s=10.0):
        """The first event for which `found` holds."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(found(e) for _, e in self.events), timeout_s
            ), self.told()
            return next(e for _, e in self.events if found(e))

    def ended(self, ref, timeout_s=10.0):
        return self.wait(lambda e: isinstance(e, Ended) and e.ref == ref, timeout_s)

    def told(self):
        return [e for _, e in self.events]

    def delivered(self, ref):
        return {e.block: e.slot for e in self.told() if isinstance(e, Delivered) and e.ref == ref}

    def released(self, ref):
        return [s for e in self.told() if isinstance(e, Released) and e.ref == ref for s in e.slots]

    def returned(self, ref):
        """Every block that came back, in either way."""
        return sorted([*self.delivered(ref).values(), *self.released(ref)])
