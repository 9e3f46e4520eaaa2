"""Tiny random-weight checkpoints of every native architecture, in odd shapes, made by transformers.

Real config classes, real tensor names; sizes chosen to hit what kernels get wrong: head sizes that
are no power of two, one and three KV heads, tied and untied heads, biases, windows, rope variants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 307  # no multiple of anything
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,  # large enough that logits differ well beyond rounding
}


@dataclass(frozen=True)
class Tiny:
    """A transformers model class and the config that makes it odd."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)


TINY = [
    Tiny("llama-gqa3", "Llama", {"head_dim": 32}),
    Tiny("llama-hd80-mqa-tied", "Llama", {
        "hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 80,
        "tie_word_embeddings": True}),
    Tiny("llama3-rope", "Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    Tiny("llama-linear-rope-bias", "Llama", {"attention_bias": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    Tiny("llama-yarn", "Llama", {"head_dim": 64, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}}),
    Tiny("mistral-window", "Mistral", {"sliding_window": 37, "head_dim": 48}),
    Tiny("mistral-full", "Mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    Tiny("qwen2-bias-tied", "Qwen2", {"tie_word_embeddings": True}),
    Tiny("qwen2-windows", "Qwen2", {
        "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    Tiny("qwen3-qknorm", "Qwen3", {"head_dim": 128, "num_key_value_heads": 2}),
    Tiny("qwen3-hd16", "Qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
]  # fmt: skip


def build(tiny: Tiny, folder: Path, dtype: str = "float32", seed: int = 0) -> Any:
    """Save a checkpoint to `folder`; returns the transformers model, in float32, in eval mode.

    Read back from the folder: a model cast in place would keep rounded rotary frequencies.
    """
    import torch
    import transformers

    config_class = getattr(transformers, f"{tiny.family}Config")
    model_class = getattr(transformers, f"{tiny.family}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**(BASE | tiny.config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model = model.to(getattr(torch, dtype))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return read_back(tiny, folder, "float32")


def read_back(tiny: Tiny, folder: Path, dtype: str) -> Any:
    """The checkpoint as transformers loads it, computing in `dtype`."""
    import torch
    import transformers

    model_class = getattr(transformers, f"{tiny.family}ForCausalLM")
    return model_class.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
