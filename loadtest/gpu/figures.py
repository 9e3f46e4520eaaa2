"""A measured figure beside what is wanted of it, and the sizes it is measured at."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kernels.triton.tune import MATRICES


@dataclass(frozen=True)
class Figure:
    """One answer."""

    name: str
    value: float
    unit: str
    wanted: str = ""
    """What issue or publication asks for, in words."""

    def line(self) -> str:
        """For a terminal."""
        wanted = f"   (wanted: {self.wanted})" if self.wanted else ""
        return f"{self.name:58}{self.value:>12.4g} {self.unit}{wanted}"


@dataclass(frozen=True)
class DecodeModel:
    """A shape of `loadtest.shapes` with random weights, decoded one sequence at a time."""

    shape: str
    wanted_share: float
    """Of the bound that reading the weights sets."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. The command has one set; its test a smaller one."""

    device: str
    copy_bytes: int
    models: tuple[DecodeModel, ...]
    batch_sizes: tuple[int, ...]
    decode_tokens: int
    heads: tuple[int, int, int]
    uniform: tuple[int, ...]
    """Context lengths of a batch; the skewed one has as many tokens in all."""
    skewed: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    """[N, K]"""
    matmul_rows: tuple[int, ...]
    throughput_shape: str
    num_requests: int
    request_lens: tuple[int, int]
    """Least and most tokens of a prompt, and of an output."""


FULL = Sizes(
    device="cuda",
    copy_bytes=2 << 30,
    models=(DecodeModel("8B", 0.85), DecodeModel("L", 0.6)),
    batch_sizes=(1, 64),
    decode_tokens=128,
    heads=(32, 8, 128),
    uniform=(8064,) * 32,
    skewed=(131_072, *(4096,) * 31),
    matrices=tuple(MATRICES),
    matmul_rows=(1, 4, 8, 16),
    throughput_shape="L",
    num_requests=128,
    request_lens=(100, 512),
)
