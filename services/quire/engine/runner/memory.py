"""How many KV blocks an engine gets."""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.request import BLOCK_SIZE

GIB = 1 << 30
SEATS_WORTH_ON_CPU = 2
"""On a CPU the pool is not made larger than this many full-length requests per seat: host memory is
everybody's, and prefixes beyond that are rarely met again."""


class KvCacheTooSmall(ValueError):
    """One request of max_model_len tokens would not fit."""


@dataclass(frozen=True)
class KvBudget:
    """Bytes the KV cache may take, and why."""

    bytes: int
    source: str
    """How the figure came about, for the error message."""


def num_blocks(budget: KvBudget, block_bytes: int, max_model_len: int) -> int:
    """Blocks that fit the budget.

    Raises KvCacheTooSmall, saying what would fit, when a single request of max_model_len does not.
    """
    blocks = budget.bytes // block_bytes
    needed = -(-max_model_len // BLOCK_SIZE)
    if blocks >= needed:
        return blocks
    raise KvCacheTooSmall(
        f"the KV cache of one request with max_model_len={max_model_len} needs "
        f"{needed * block_bytes / GIB:.2f} GiB, but {budget.bytes / GIB:.2f} GiB are available "
        f"({budget.source}): use --max-model-len {max(blocks * BLOCK_SIZE, 0)} or less, or give "
        f"--kv-cache-memory-bytes {needed * block_bytes} or more"
    )
