"""Reads a Hugging Face config.json into the few numbers a decoder needs.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling`, and the `rope_parameters`
of transformers 5. Whatever the engine would compute wrongly is refused here, by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.engine.models.errors import UnsupportedModel
from quire.engine.quantization.config import Quantization, parse_quantization

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `kind` and the parameters of that kind, as the checkpoint names them."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-like decoder; sizes of the whole model, not of one rank."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    dtype: str
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Sliding window of each layer, None for full attention."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    quantization: Quantization | None = None
    """How linear layers are quantized; None for floats."""


NATIVE = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures with a native implementation, all the one of `llama.py`."""


def read_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder.

    Raises UnsupportedModel, or ValueError when config.json is missing or malformed.
    """
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_config(raw, read_json(generation) if generation.exists() else {})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} not found in {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Interpret the contents of config.json and generation_config.json."""
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in NATIVE:
        known = ", ".join(sorted(NATIVE))
        raise UnsupportedModel(f"architecture {architecture} is not supported; supported: {known}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {raw['hidden_act']!r} is not supported")
    if raw.get("mlp_bias", False):
        raise UnsupportedModel("biases in the MLP (mlp_bias) are not supported")
    try:
        return _build(architecture, raw, generation)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}") from None


def _build(architecture: str, raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    num_heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // num_heads)
    family = NATIVE[architecture]
    attention_bias = bool(raw.get("attention_bias", False))
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, head_dim),
        max_position=int(raw.get("max_position_embeddings", 2048)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family in ("llama", "qwen3") and attention_bias,
        qk_norm=family == "qwen3",
        windows=_windows(raw, family),
        eos_token_ids=tuple([eos] if isinstance(eos, int) else eos or ()),
        bos_token_id=raw.get("bos_token_id"),
        quantization=parse_quantization(raw),
    )


def _rope(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel("rotary settings that differ between layer types are not supported")
    kind = str(parameters.pop("rope_type", parameters.pop("type", "default")))
    theta = float(parameters.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    partial = float(parameters.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    parameters.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return RopeConfig(
        theta=theta, rotary_dim=int(head_dim * partial), kind=kind, parameters=parameters
    )


def _windows(raw: dict[str, Any], family: str) -> tuple[int | None, ...]:
    """Sliding window per layer, by the rules of the families that have one."""
    num_layers = int(raw["num_hidden_layers"])
    window = raw.get("sliding_window")
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        window = None
    if window is None or family == "llama":
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28)) if family.startswith("qwen") else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
