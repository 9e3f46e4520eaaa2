"""Quantized checkpoints of the tiny models, written bit by bit as each format's tools write them.

`Layer` holds what a format's integers mean, so that tests know the floats they stand for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in each nibble of a word, from the lowest up."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """Unsigned values, with a scale and zero point for each group; column k is in group_of[k]."""

    values: torch.Tensor  # int64 [N, K], 0 .. 2^bits - 1
    scales: torch.Tensor  # float16-exact [N, groups]
    zeros: torch.Tensor  # int64 [N, groups], 0 .. 2^bits - 1
    group_of: torch.Tensor  # int64 [K]
    bits: int

    @property
    def floats(self) -> torch.Tensor:
        """The matrix that the integers stand for, float32 [N, K]."""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return (self.values - zeros).float() * scales

    @classmethod
    def of(
        cls, weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool, permuted: bool
    ) -> Layer:
        """Round a matrix [N, K]; `permuted` scatters a group's columns, alike for every N."""
        n, k = weight.shape
        group_of = torch.arange(k) // group_size
        if permuted:
            group_of = group_of[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        groups, half = int(group_of.max()) + 1, 2 ** (bits - 1)
        scales = torch.empty(n, groups)
        zeros = torch.full((n, groups), half)
        for group in range(groups):
            part = weight.float()[:, group_of == group]
            low, high = part.amin(1), part.amax(1)
            if symmetric:
                scales[:, group] = part.abs().amax(1) / (half - 1)
            else:
                scales[:, group] = (high.clamp(min=0) - low.clamp(max=0)) / (2 * half - 1)
                zeros[:, group] = (-low.clamp(max=0) / scales[:, group]).round().long()
        scales = scales.half().float()
        values = (weight.float() / scales[:, group_of]).round().long() + zeros[:, group_of]
        return cls(values.clamp(0, 2 * half - 1), scales, zeros, group_of, bits)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Runs of values along the last dimension as int32 words, the first in the lowest bits."""
    per_word = 32 // bits
    rows, columns = values.shape
    words = torch.zeros(rows, -(-columns // per_word), dtype=torch.int64)
    for column in range(columns):
        words[:, column // per_word] |= values[:, column] << (column % per_word * bits)
    return as_int32(words)


def as_int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits, as the signed integers that files hold."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(layer: Layer, *, version: int = 1) -> Tensors:
    """AutoGPTQ's tensors, or those of its second version."""
    zeros = pack_rows(layer.zeros.T, layer.bits).long()
    if version == 1:
        zeros = zeros - sum(1 << place for place in range(0, 32, layer.bits))
    return {
        "qweight": pack_rows(layer.values, layer.bits).T.contiguous(),
        "qzeros": as_int32(zeros),
        "scales": layer.scales.T.half().contiguous(),
        "g_idx": layer.group_of.to(torch.int32),
    }


def awq(layer: Layer) -> Tensors:
    """AutoAWQ's tensors, version gemm."""

    def pack(values: torch.Tensor) -> torch.Tensor:
        by_word = values.view(len(values), -1, 8)[:, :, list(AWQ_ORDER)]
        return pack_rows(by_word.flatten(1), 4)

    return {
        "qweight": pack(layer.values.T),
        "qzeros": pack(layer.zeros.T),
        "scales": layer.scales.T.half().contiguous(),
    }


def compressed(layer: Layer, *, packed: bool, symmetric: bool, permuted: bool) -> Tensors:
    """llm-compressor's tensors, pack-quantized or int-quantized."""
    half = 2 ** (layer.bits - 1)
    tensors = {"weight_scale": layer.scales.bfloat16()}
    if packed:
        tensors["weight_packed"] = pack_rows(layer.values, layer.bits)
        tensors["weight_shape"] = torch.tensor(layer.values.shape)
    else:
        tensors["weight"] = (layer.values - half).to(torch.int8)
    if not symmetric:
        signed = (layer.zeros - half).to(torch.int8)
        by_rows = pack_rows(layer.zeros.T, layer.bits).T.contiguous()
        tensors["weight_zero_point"] = by_rows if packed else signed
    if permuted:
        tensors["weight_g_idx"] = layer.group_of.to(torch.int32)
    return tensors


@dataclass(frozen=True)
class Kind:
    """A format as a checkpoint: config.json's part, and how a layer is rounded and written."""

    name: str
    config: dict[str, Any]
    write: Callable[[Layer], Tensors]
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    permuted: bool = False


def _gptq_config(kind_bits: int = 4, group_size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": kind_bits, "group_size": group_size} | more


def _compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    scheme = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group"} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


WHOLE_ROW = 1 << 20

KINDS = [
    Kind("gptq4", _gptq_config(), gptq),
    Kind("gptq8-asymmetric", _gptq_config(8, sym=False), gptq, bits=8, symmetric=False),
    Kind("gptq4-v2-asymmetric", _gptq_config(sym=False, checkpoint_format="gptq_v2"),
         lambda layer: gptq(layer, version=2), symmetric=False),
    Kind("gptq4-row", _gptq_config(group_size=-1), gptq, group_size=WHOLE_ROW),
    Kind("gptq4-desc_act", _gptq_config(desc_act=True), gptq, permuted=True),
    Kind("awq4", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                  "version": "gemm"}, awq, symmetric=False),
    Kind("compressed4", _compressed_config("pack-quantized", group_size=32),
         lambda layer: compressed(layer, packed=True, symmetric=True, permuted=False)),
    Kind("compressed4-asymmetric",
         _compressed_config("pack-quantized", group_size=32, symmetric=False),
         lambda layer: compressed(layer, packed=True, symmetric=False, permuted=False),
         symmetric=False),
    Kind("compressed8-row",
         _compressed_config("pack-quantized", num_bits=8, strategy="channel"),
         lambda layer: compressed(layer, packed=True, symmetric=True, permuted=False),
         bits=8, group_size=WHOLE_ROW),
    Kind("compressed4-actorder",
         _compressed_config("pack-quantized", group_size=32, actorder="group"),
         lambda layer: compressed(layer, packed=True, symmetric=True, permuted=True),
         permuted=True),
    Kind("compressed8-plain",
         _compressed_config("int-quantized", num_bits=8, strategy="channel"),
         lambda layer: compressed(layer, packed=False, symmetric=True, permuted=False),
         bits=8, group_size=WHOLE_ROW),
]  # fmt: skip


def convert(source: Path, kind: Kind, quantized: Path, floats: Path) -> None:
    """Write a float checkpoint's layers as integers, and the floats that those stand for."""
    tensors = load_file(source / "model.safetensors")
    integers = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer = Layer.of(
            integers.pop(name), kind.bits, kind.group_size,
            symmetric=kind.symmetric, permuted=kind.permuted,
        )  # fmt: skip
        written = kind.write(layer)
        prefix = name.removesuffix("weight")
        integers.update({prefix + key: tensor for key, tensor in written.items()})
        # scales as they were rounded to be written
        scales = written["scales"].T if "scales" in written else written["weight_scale"]
        tensors[name] = replace(layer, scales=scales.float()).floats
    config = json.loads((source / "config.json").read_text())
    for folder, content, more in (
        (quantized, integers, {"quantization_config": kind.config}),
        (floats, tensors, {}),
    ):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | more))
        save_file({name: tensor.contiguous() for name, tensor in content.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
