"""What pods tell the router, whatever the wire: made from proto in `convert`, by hand in tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PodModel:
    """What a pod serves."""

    pod: str
    incarnation: int = 0
    model: str = ""
    block_size: int = 16
    """Tokens."""
    num_blocks: int = 1 << 20
    block_bytes: int = 2 << 20
    max_num_seqs: int = 1 << 20
    kv_layout: int = 0
    """Identity of what its blocks hold and how."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How busy a pod is. Rates of 0 are not measured yet."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens of waiting requests, those included that will turn out to be cached."""
    prefilling_tokens: int = 0
    """Prompt tokens of running requests that are not yet computed."""
    blocks_free: int = 1 << 20
    blocks_cached: int = 0
    prefill_tokens_per_s: float = 0.0
    itl_s: float = 0.0
    itl_slope_s: float = 0.0
    prefill_weight: float = 1.0
    decode_weight: float = 1.0
    draining: bool = False
    transfer_rates: tuple[tuple[str, float], ...] = ()
    """(pod that pushes to this one, bytes per second)."""
