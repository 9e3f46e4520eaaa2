"""Write and read the model folder: Hugging Face files, each replaced in one step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from quire.demo.network import Llama, LlamaShape
from quire.demo.tokens import BOS, END, EOS, PAD, special_id

if TYPE_CHECKING:
    from pathlib import Path

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] in ['system', 'developer'] %}
        {%- set role = 'system' %}
    {%- elif message['role'] == 'assistant' %}
        {%- set role = 'assistant' %}
    {%- else %}
        {%- set role = 'user' %}
    {%- endif %}
    {{- '<|' + role + '|>' + (message['content'] or '') | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def export(folder: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write everything but the model card; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", _json(config(model.shape, tokenizer)))
    write_atomically(folder / "generation_config.json", _json(generation_config(tokenizer)))
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_atomically(folder / "tokenizer_config.json", _json(tokenizer_config(model.shape)))
    write_atomically(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """The exported model, in float32, and its tokenizer."""
    settings = json.loads((folder / "config.json").read_text())
    shape = LlamaShape(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        intermediate_size=settings["intermediate_size"],
        max_positions=settings["max_position_embeddings"],
        rope_theta=settings["rope_theta"],
        norm_eps=settings["rms_norm_eps"],
    )
    model = Llama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def config(shape: LlamaShape, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": special_id(tokenizer, BOS),
        "eos_token_id": [special_id(tokenizer, EOS), special_id(tokenizer, END)],
        "pad_token_id": special_id(tokenizer, PAD),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {
        "bos_token_id": special_id(tokenizer, BOS),
        "eos_token_id": [special_id(tokenizer, EOS), special_id(tokenizer, END)],
        "pad_token_id": special_id(tokenizer, PAD),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def tokenizer_config(shape: LlamaShape) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
