"""The Llama family: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3. Wiring only.

One pre-norm decoder with grouped-query attention and a SiLU-gated MLP; the families differ in
biases, per-head query/key norms, sliding windows and rotary tables, which the config carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.models.rope import build_rope
from quire.kernels.ops import AttentionShape

if TYPE_CHECKING:
    import torch

    from quire.engine.models.config import ModelConfig
    from quire.engine.models.weights import Weights
    from quire.kernels.ops import Linear, Ops, Rope, Value


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, packed."""

    index: int
    input_norm: torch.Tensor  # [H]
    qkv: Linear  # [(nh + 2 nkv) hd, H]
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None  # [hd], [hd], eps
    shape: AttentionShape
    o: Linear  # [H, nh hd]
    post_norm: torch.Tensor  # [H]
    gate_up: Linear  # [2 I, H]
    down: Linear  # [H, I]


class Llama:
    """A decoder over `Ops`; holds packed weights, computes nothing by itself."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, max_positions: int) -> None:
        self.config = config
        self.eps = config.norm_eps
        self.rope: Rope = build_rope(config.rope, max_positions)
        self.embedding = ops.pack_embedding(weights.take("model.embed_tokens.weight"))
        self.layers = [_load_layer(config, ops, weights, i) for i in range(config.num_layers)]
        self.norm = weights.take("model.norm.weight")
        if config.tie_embeddings:
            self.head = self.embedding
            weights.ignore("lm_head.weight")
        else:
            self.head = ops.pack_embedding(weights.take("lm_head.weight"))

    def forward(self, ops: Ops) -> Value:
        """Logits [R, V] of the step that `ops` holds."""
        x = ops.embed(self.embedding)
        for layer in self.layers:
            h = ops.rms_norm(x, layer.input_norm, self.eps)
            qkv = ops.linear(h, layer.qkv)
            q = ops.rope_and_cache(qkv, layer.index, layer.shape, self.rope, layer.qk_norms)
            h = ops.attention(q, layer.index, layer.shape)
            x = ops.linear_add(h, layer.o, x)
            h = ops.rms_norm(x, layer.post_norm, self.eps)
            h = ops.gate_up_silu(h, layer.gate_up)
            x = ops.linear_add(h, layer.down, x)
        x = ops.take_logit_rows(x)
        return ops.logits(ops.rms_norm(x, self.norm, self.eps), self.head)


def _load_layer(config: ModelConfig, ops: Ops, weights: Weights, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def bias(name: str, present: bool) -> torch.Tensor | None:
        return weights.take(f"{name}.bias") if present else None

    def linear(name: str, has_bias: bool) -> Linear:
        return ops.pack_linear([weights.take(f"{name}.weight")], [bias(name, has_bias)])

    projections = [f"{attention}.{p}_proj" for p in "qkv"]
    qkv = ops.pack_linear(
        [weights.take(f"{name}.weight") for name in projections],
        [bias(name, config.qkv_bias) for name in projections],
    )
    norms = None
    if config.qk_norm:
        q_norm = weights.take(f"{attention}.q_norm.weight")
        k_norm = weights.take(f"{attention}.k_norm.weight")
        norms = (q_norm, k_norm, config.norm_eps)
    shape = AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        window=config.windows[index],
    )
    return Layer(
        index=index,
        input_norm=weights.take(f"{prefix}.input_layernorm.weight"),
        qkv=qkv,
        qk_norms=norms,
        shape=shape,
        o=linear(f"{attention}.o_proj", config.o_bias),
        post_norm=weights.take(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=ops.pack_gate_up(
            weights.take(f"{mlp}.gate_proj.weight"), weights.take(f"{mlp}.up_proj.weight")
        ),
        down=linear(f"{mlp}.down_proj", False),
    )


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this config has."""
    hidden, inner, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * hd, config.num_kv_heads * hd
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for name, size in (("q", q), ("k", kv), ("v", kv)):
        layer[f"self_attn.{name}_proj.weight"] = (size, hidden)
        if config.qkv_bias:
            layer[f"self_attn.{name}_proj.bias"] = (size,)
    if config.o_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (hd,)
    for i in range(config.num_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    return shapes
