"""What one rank of a tensor-parallel group holds of a model.

q, gate, up    rows of its query heads and of its part of the MLP
k, v           rows of its KV heads; with more ranks than KV heads, several ranks hold the same
o, down        the columns that meet those rows
embedding      rows of its part of the vocabulary; the same for the head
norms          whole; biases that follow a sum over ranks, on the first rank alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.kernels.group import part_of
from quire.transfer.layout import Shard, heads_of

if TYPE_CHECKING:
    from quire.engine.models.config import ModelConfig

WHOLE = Shard()
WORD = 8
"""Columns that a packed word of a quantized checkpoint holds, at most."""


@dataclass(frozen=True)
class Partition:
    """Rows and columns of the checkpoint's matrices that belong to one rank."""

    shard: Shard
    num_heads: int
    num_kv_heads: int
    q: range
    kv: range
    inner: range
    vocabulary: range

    @classmethod
    def of(cls, config: ModelConfig, shard: Shard) -> Partition:
        """The part of `shard`, of a degree that `check_degree` let pass."""
        hd, heads = config.head_dim, config.num_heads // shard.degree
        kv = heads_of(config.num_kv_heads, shard)
        return cls(
            shard=shard,
            num_heads=heads,
            num_kv_heads=len(kv),
            q=range(shard.rank * heads * hd, (shard.rank + 1) * heads * hd),
            kv=range(kv.start * hd, kv.stop * hd),
            inner=part_of(config.intermediate_size, shard.rank, shard.degree),
            vocabulary=part_of(config.vocab_size, shard.rank, shard.degree),
        )


def check_degree(config: ModelConfig, degree: int) -> None:
    """Raise ValueError, naming the degrees that work, when the model cannot be split so."""
    if _fits(config, degree):
        return
    fitting = [n for n in range(1, config.num_heads + 1) if _fits(config, n)]
    shown = ", ".join(map(str, fitting))
    raise ValueError(
        f"tensor_parallel_size={degree} does not fit this model: its {config.num_heads} attention "
        f"heads, {config.num_kv_heads} KV heads and {config.intermediate_size} MLP columns"
        f"{_groups(config)} can be split over {shown} ranks: give --tensor-parallel-size one of "
        "these"
    )


def _groups(config: ModelConfig) -> str:
    """What quantization adds to the message."""
    if config.quantization is None:
        return ""
    if any(each.permutes for each in config.quantization.formats):
        return ", whose quantized columns are permuted (desc_act),"
    sizes = sorted({each.group_size for each in config.quantization.formats if each.group_size})
    return f", quantized in groups of {' and '.join(map(str, sizes))} columns," if sizes else ""


def _fits(config: ModelConfig, degree: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        return False
    sizes = (config.intermediate_size, config.vocab_size)
    return all(part_of(size, degree - 1, degree) for size in sizes) and _whole_groups(
        config, degree
    )


def _whole_groups(config: ModelConfig, degree: int) -> bool:
    """Where matrices are cut by columns (o, down), no group of quantized columns is."""
    if degree == 1 or config.quantization is None:
        return True
    cuts = (
        config.num_heads // degree * config.head_dim,
        len(part_of(config.intermediate_size, 0, degree)),
    )
    return not any(
        each.permutes or any(cut % (each.group_size or WORD) for cut in cuts)
        for each in config.quantization.formats
    )
