"""Endpoints for tests: a pool with known bytes, and what happened to every block.

The pool is host memory, or passes for a device's: with `memory="staged"` its blocks are exchanged
through `staging_places` places, by the copies that a CUDA pool would make.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import torch
from wire import unknown_field

from quire.config.transfer import TransferConfig
from quire.engine.runner.pool_copies import PoolCopies
from quire.proto.transfer_pb2 import Hello
from quire.transfer.endpoint import Endpoint
from quire.transfer.faults import FaultPlan, FaultyTransport
from quire.transfer.layout import FRAME_BYTES, BlockLayout, Shard, block_bytes
from quire.transfer.local import LocalNetwork, LocalTransport
from quire.transfer.memory import HostMemory
from quire.transfer.negotiate import Identity
from quire.transfer.staging import StagedMemory
from quire.transfer.state import Delivered, Ended, Released, new_number

LAYOUT = BlockLayout("tiny", "bfloat16", 16, num_layers=4, num_kv_heads=4, head_dim=32)
WHOLE = Shard()
QUICK = {"kv_lease_s": 1.0, "kv_heartbeat_s": 0.1, "kv_connect_timeout_s": 3.0}


def config(**changes):
    return TransferConfig(**{**QUICK, "kv_transports": ("tcp",), **changes})


class Quiet:
    """A channel to nobody."""

    frames_at_once = 1

    def __init__(self, frame_bytes=FRAME_BYTES):
        self.frame_bytes = frame_bytes

    def start(self, intake, closed):
        pass

    def close(self):
        pass


class GatedCopies:
    """Copies that wait until they are let through, or fail."""

    def __init__(self, inner):
        self._inner = inner
        self.places, self.num_blocks = inner.places, inner.num_blocks
        self.block_bytes = inner.block_bytes
        self.entered, self.gate = threading.Event(), threading.Event()
        self.error = None

    def copy_out(self, slots, places):
        self._pass(self._inner.copy_out, slots, places)

    def copy_in(self, slots, places):
        self._pass(self._inner.copy_in, slots, places)

    def _pass(self, copy, slots, places):
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        copy(slots, places)


class Side:
    """An endpoint with its pool and everything that it said."""

    memory = "host"
    """For sides that are not told."""

    def __init__(self, *, num_blocks=64, layout=LAYOUT, shard=WHOLE, seed=0, **options):
        transports = options.pop("transports", None)
        kind = options.pop("memory", None) or self.memory
        places = options.pop("staging_places", 10)
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
        if kind == "host":
            memory = HostMemory(self.pool, size)
        else:
            copies = PoolCopies(torch.from_numpy(self.pool), places * size)
            self.copies = GatedCopies(copies) if kind == "gated" else copies
            memory = StagedMemory(self.copies)
        self.memory_used = memory
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

    def state(self, ref):
        """Of a transfer's machine on this side; None when there is none, or no more."""
        core = self.endpoint._core
        live = core.receiver._incoming.get(ref) or core.sender._departing.get(ref)
        return None if live is None else live.machine.state.value

    def is_copying(self):
        """Of a gated side: a copy has begun, and waits."""
        return self.copies.entered.wait(10)

    def let_copies_through(self):
        """Of a gated side: from now on they do not wait."""
        self.copies.gate.set()

    def places_taken(self):
        """Of a staged side: out, in."""
        return self.memory_used.outbound.num_taken, self.memory_used.inbound.num_taken

    def returned(self, ref):
        """Every block that came back, in either way."""
        return sorted([*self.delivered(ref).values(), *self.released(ref)])


class Net:
    """Sides on one in-process network."""

    def __init__(self, plan=None):
        self.network = LocalNetwork()
        self.plan = plan or FaultPlan()

    def side(self, seed, **options):
        transport = FaultyTransport(LocalTransport(self.network), self.plan)
        return Side(seed=seed, transports=[transport], **options)


def run(p, d, blocks=12, slots=range(30, 42)):
    """One transfer from p to d; both sides' last events."""
    ref = d.endpoint.receive(blocks)
    d.endpoint.grant(ref, 0, slots)
    p.endpoint.send(ref, d.peer)
    p.endpoint.offer(ref, 0, range(blocks))
    p.endpoint.commit(ref, blocks=blocks, tokens=blocks * 16 - 3, meta=b"first token")
    return ref, d.ended(ref), p.ended(ref)


class Newer(Identity):
    """A process of a later version: what it says of itself differs by `added`."""

    added: dict

    def hello(self, listeners, capabilities):
        hello = super().hello(listeners, capabilities)
        hello.capabilities.append("teleport")
        for name, value in self.added.items():
            setattr(hello, name, value)
        return Hello.FromString(hello.SerializeToString() + unknown_field())


def newer(side, **added):
    """The side, which speaks as a later version would. Before it starts."""
    node = side.endpoint._core.node
    node.identity = Newer(**vars(node.identity))
    object.__setattr__(node.identity, "added", added)
    return side
