"""How one KV block lies in memory: the contract between kernels, engine and KV transfer.

A block holds 16 tokens of every layer and every KV head of one rank, as one contiguous span:

    pool   [num_blocks, block]                     one block = one descriptor to send
    block  [kv_head][layer][K tile | V tile]       the head is outermost, so a rank's share under
                                                   another tensor-parallel degree is a sub-span
    tile   16 tokens x head_dim elements, in the inner order that `KvOrder` names

`KvOrder` is part of the layout fingerprint: pods with different orders do not exchange blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

BLOCK_SIZE = 16
"""Tokens in a block."""


class KvOrder(StrEnum):
    """Inner order of the K and V tiles of one (head, layer).

    PLAIN: K [16][head_dim], V [16][head_dim]. What GPU kernels and the torch reference read.
    LANES: K [head_dim][16], V [16][head_dim]. fp32/fp16 on CPU: 16 tokens are the vector lanes.
    PAIRS: K [head_dim/2][16][2], V [16/2][head_dim][2]. bf16 on CPU: pairs along the reduced
           dimension, which is what AMX tiles and AVX512-BF16 dot products load directly.
    """

    PLAIN = "plain"
    LANES = "lanes"
    PAIRS = "pairs"


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvLayout:
    """Shape of one rank's KV pool. `dtype` is a torch dtype name; sizes in elements unless said."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    order: KvOrder = KvOrder.PLAIN
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype must be one of {sorted(DTYPE_BYTES)}, not {self.dtype!r}")
        if self.order is KvOrder.PAIRS and self.head_dim % 2:
            raise ValueError("KvOrder.PAIRS needs an even head_dim")

    @property
    def tile(self) -> int:
        """Elements of one K or V tile: 16 tokens of one head of one layer."""
        return self.block_size * self.head_dim

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """[kv_head, layer, 2 (K, V), tile]."""
        return (self.num_kv_heads, self.num_layers, 2, self.tile)

    @property
    def block_elements(self) -> int:
        """Elements of one block."""
        return math.prod(self.block_shape)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and this rank's heads."""
        return self.block_elements * DTYPE_BYTES[self.dtype]
