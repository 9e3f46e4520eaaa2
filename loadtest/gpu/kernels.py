"""Bandwidth, decode attention and integer matmuls, kernel by kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from loadtest.gpu.figures import Figure
from quire.kernels.timing import seconds
from quire.kernels.triton.int_matmul import int_matmul
from quire.kernels.triton.tune import attention_work, random_int4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.gpu.figures import Sizes

BF16_BYTES = 2


def bandwidth(sizes: Sizes) -> float:
    """Bytes per second that a large copy reads and writes."""
    device = torch.device(sizes.device)
    source = torch.zeros(sizes.copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copy_bytes / seconds(lambda: target.copy_(source), device)


def attention(sizes: Sizes, bytes_per_s: float) -> Iterator[Figure]:
    """Decode attention of one layer: its share of the bandwidth, and the cost of a long context."""
    device = torch.device(sizes.device)
    times = {}
    for name in ("uniform", "skewed"):
        lengths = getattr(sizes, name)
        _, make = attention_work(sizes.heads, lengths, device)
        times[name] = seconds(make(None), device)
    _, kv_heads, head_dim = sizes.heads
    read = sum(sizes.uniform) * kv_heads * head_dim * 2 * BF16_BYTES
    share = read / times["uniform"] / bytes_per_s
    yield Figure("decode attention, share of the bandwidth", share, "", ">= 0.92")
    per_token = {name: took / sum(getattr(sizes, name)) for name, took in times.items()}
    ratio = per_token["skewed"] / per_token["uniform"]
    yield Figure("decode attention, skewed over uniform", ratio, "x", "<= 1.15")


def matmuls(sizes: Sizes) -> Iterator[Figure]:
    """A layer's matmuls with int4 weights against bf16 weights in torch."""
    device = torch.device(sizes.device)
    for rows in sizes.matmul_rows:
        times = {"bf16": 0.0, "int4": 0.0}
        for n, k in sizes.matrices:
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
            plain = torch.randn(n, k, dtype=torch.bfloat16, device=device)
            packed = random_int4(n, k, device)
            times["bf16"] += seconds(lambda x=x, w=plain: F.linear(x, w), device)  # type: ignore[misc]
            times["int4"] += seconds(lambda x=x, w=packed: int_matmul(x, w), device)  # type: ignore[misc]
        ratio = times["bf16"] / times["int4"]
        yield Figure(f"int4 matmul over bf16, batch {rows}", ratio, "x", ">= 3")
