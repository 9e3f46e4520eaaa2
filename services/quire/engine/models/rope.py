"""Rotary tables for the scaling rules that checkpoints name.

Sources: RoPE, Su et al. 2021; linear scaling, Chen et al. 2023; YaRN, Peng et al. 2023 (eq. 17-23
and the attention factor of its section 3.4); "llama3", the rule shipped with Llama 3.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.engine.models.errors import UnsupportedModel
from quire.kernels.ops import Rope

if TYPE_CHECKING:
    from quire.engine.models.config import RopeConfig


def build_rope(config: RopeConfig, num_positions: int) -> Rope:
    """cos and sin tables [num_positions, rotary_dim / 2] float32.

    Every worker gets the same bits. They do not come from torch: its first large cos or sin in a
    process may come out right to half the digits in one thread's share, where MKL chooses its
    kernels while several threads call them (pytorch issue 188792, on Intel processors).

    Raises UnsupportedModel for a scaling rule not known here.
    """
    inverse, scale = _inverse_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse.float()[None]
    return Rope(cos=_rounded(np.cos, angles) * scale, sin=_rounded(np.sin, angles) * scale)


def _rounded(function: np.ufunc, angles: torch.Tensor) -> torch.Tensor:
    """In double precision, rounded once: float32, like `angles`."""
    table = np.empty(angles.shape, np.float32)
    function(angles.numpy(), out=table, dtype=np.float64, casting="same_kind")
    return torch.from_numpy(table)


def _inverse_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """[rotary_dim / 2] inverse frequencies, and the factor on cos and sin."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float()
    base = 1.0 / (config.theta ** (exponents / config.rotary_dim))
    p = config.parameters
    match config.kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / p["factor"], 1.0
        case "llama3":
            return _llama3(base, config), 1.0
        case "yarn":
            return _yarn(base, config), _yarn_scale(config)
    raise UnsupportedModel(f"rope scaling {config.kind!r} is not supported")


def _llama3(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, a smooth band between."""
    p = config.parameters
    context = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / base
    smooth = (context / wavelength - low) / (high - low)
    mixed = (1 - smooth) * base / p["factor"] + smooth * base
    scaled = torch.where(wavelength > context / low, base / p["factor"], base)
    in_band = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(in_band, mixed, scaled)


def _yarn(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    p, dim = config.parameters, config.rotary_dim
    context = p["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return (dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    blended: torch.Tensor = base / p["factor"] * (1 - keep) + base * keep
    return blended


def _yarn_scale(config: RopeConfig) -> float:
    p = config.parameters
    factor = p["factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)
