"""What the router knows about the pods when it decides: `Endpoint` is one, `Endpoints` all of them.

Costs are computed for all pods at once, so `Endpoints` holds one array per field of `Endpoint`,
by slot. It is a snapshot for one decision: frozen, and no policy writes to its arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool]
    PairRates = Mapping[int, Mapping[int, float]]
    """Prefill slot -> decode slot -> bytes per second that were measured."""

BLOCK_SIZE = 16
NO_RATES: PairRates = {}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One pod at one moment. Rates are moving averages that the pod measured, or priors."""

    pod: str
    """Stable id."""
    model: str = ""
    serving: bool = True
    """Connected, has reported its load, and is not draining."""
    suspect: bool = False
    """Silent for too long: used when nothing else is left."""
    prefill_weight: float = 1.0
    """0 to 1: how much prefill work for others it should get; 0 = none while others can."""
    decode_weight: float = 1.0
    wait_s: float = 0.0
    """Seconds until its queued prefill work is done."""
    prefill_tokens_per_s: float = 8000.0
    running: float = 0.0
    """Streams in its batch, or on their way into it."""
    itl_s: float = 0.02
    itl_slope_s: float = 0.0002
    """Growth of the token latency with each further stream."""
    blocks_free: float = 1e6
    """Blocks without content."""
    blocks_cached: float = 0.0
    """Blocks that hold a prefix and can be evicted, less what waiting requests will need; below
    0 when those have to wait for running ones to end."""
    num_blocks: float = 1e6
    max_seqs: float = 1e6
    """Most streams in its batch."""
    block_size: float = BLOCK_SIZE
    """Tokens."""
    bytes_per_token: float = 131072.0
    """Of keys and values, for transfers."""
    kv_layout: float = 0.0
    """Identity: blocks go between pods that have the same."""
    receive_bytes_per_s: float = 1e9
    """Blocks pushed to it, from a peer not measured yet."""
    cached_tokens: float = 0.0
    """Leading tokens of the request's prompt that it is expected to hold."""


COLUMNS = tuple(f for f in fields(Endpoint) if f.name not in ("pod", "model"))


@dataclass(frozen=True, eq=False)
class Endpoints:
    """All pods by slot. Each array has one entry per slot; free slots are not `serving`."""

    pods: Sequence[str]
    model_names: Sequence[str]
    model: NDArray[np.int32]
    """Indices into `model_names`."""
    serving: Flags
    suspect: Flags
    prefill_weight: Floats
    decode_weight: Floats
    wait_s: Floats
    prefill_tokens_per_s: Floats
    running: Floats
    itl_s: Floats
    itl_slope_s: Floats
    blocks_free: Floats
    blocks_cached: Floats
    num_blocks: Floats
    max_seqs: Floats
    block_size: Floats
    bytes_per_token: Floats
    kv_layout: Floats
    receive_bytes_per_s: Floats
    cached_tokens: Floats
    pair_bytes_per_s: PairRates = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.serving)

    @classmethod
    def of(
        cls,
        endpoints: Sequence[Endpoint],
        pair_bytes_per_s: PairRates = NO_RATES,
    ) -> Endpoints:
        """The same pods as columns."""
        columns = {f.name: column([getattr(e, f.name) for e in endpoints]) for f in COLUMNS}
        names = sorted({e.model for e in endpoints})
        return cls(
            pods=[e.pod for e in endpoints],
            model_names=names,
            model=np.array([names.index(e.model) for e in endpoints], np.int32),
            pair_bytes_per_s=pair_bytes_per_s,
            **columns,
        )

    def __getitem__(self, slot: int) -> Endpoint:
        values = {f.name: getattr(self, f.name)[slot].item() for f in COLUMNS}
        model = self.model_names[self.model[slot]]
        return Endpoint(pod=self.pods[slot], model=model, **values)

    def at(self, slots: NDArray[np.int64]) -> Endpoints:
        """The pods in some slots, renumbered from 0, each slot once or more."""
        columns = {f.name: getattr(self, f.name)[slots] for f in COLUMNS}
        wanted = slots.tolist()
        pairs = {
            i: {j: measured[d] for j, d in enumerate(wanted) if d in measured}
            for i, p in enumerate(wanted)
            if (measured := self.pair_bytes_per_s.get(p))
        }
        return Endpoints(
            pods=[self.pods[slot] for slot in wanted],
            model_names=self.model_names,
            model=self.model[slots],
            pair_bytes_per_s=pairs,
            **columns,
        )


def column(values: Sequence[Any]) -> NDArray[Any]:
    """An array of flags or of numbers."""
    return np.array(values, bool if values and isinstance(values[0], bool) else np.float64)
