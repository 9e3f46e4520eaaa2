"""The Llama family: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3. Wiring only.

One pre-norm decoder with grouped-query attention and a SiLU-gated MLP; the families differ in
biases, per-head query/key norms, sliding windows and rotary tables, which the config carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.models.partition import WHOLE, Partition
from quire.engine.models.rope import build_rope
from quire.engine.quantization.matrices import Matrices
from quire.kernels.ops import AttentionShape

if TYPE_CHECKING:
    import torch

    from quire.engine.models.config import ModelConfig
    from quire.engine.models.weights import Weights
    from quire.kernels.ops import Linear, Ops, Rope, Value
    from quire.transfer.layout import Shard


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
    """A decoder over `Ops`, or one rank's part of it; holds packed weights, computes nothing by
    itself."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: Weights,
        max_positions: int,
        shard: Shard = WHOLE,
    ) -> None:
        self.config = config
        self.eps = config.norm_eps
        self.rope: Rope = build_rope(config.rope, max_positions)
        matrices = Matrices(weights, config.quantization)
        loader = _Loader(config, ops, weights, matrices, Partition.of(config, shard))
        table = weights.take("model.embed_tokens.weight", loader.part.vocabulary)
        self.embedding = ops.pack_embedding(table, config.vocab_size)
        self.layers = [loader.layer(i) for i in range(config.num_layers)]
        self.norm = weights.take("model.norm.weight")
        self.head = loader.head(self.embedding, table)

    def forward(self, ops: Ops) -> Value:
        """Logits [R, V] of the step that `ops` holds."""
        x = ops.embed(self.embedding)
        for layer in self.layers:
            h = ops.rms_norm(x, layer.input_norm, self.eps)
            qkv = ops.linear(h, layer.qkv)
            q = ops.rope_and_cache(qkv, layer.index, layer.shape, self.rope, layer.qk_norms)
            h = ops.attention(q, layer.index, layer.shape)
            if layer is self.layers[-1]:  # from here on a row serves its own logits alone
                h, x = ops.take_logit_rows(h), ops.take_logit_rows(x)
            x = ops.linear_add(h, layer.o, x)
            h = ops.rms_norm(x, layer.post_norm, self.eps)
            h = ops.gate_up_silu(h, layer.gate_up)
            x = ops.linear_add(h, layer.down, x)
        return ops.logits(ops.rms_norm(x, self.norm, self.eps), self.head)


@dataclass(frozen=True)
class _Loader:
    """Packs one rank's part of the weights."""

    config: ModelConfig
    ops: Ops
    weights: Weights
    matrices: Matrices
    part: Partition

    def head(self, embedding: Linear, table: torch.Tensor) -> Linear:
        """What gives logits: the packed embedding of `table` itself, when tied and in floats."""
        tied = table if self.config.tie_embeddings else None
        matrix = self.matrices.head(tied, self.part.vocabulary)
        if tied is not None:
            self.weights.ignore("lm_head.weight")
        if matrix is tied:
            return embedding
        return self.ops.pack_head(matrix, self.config.vocab_size)

    def layer(self, index: int) -> Layer:
        config, weights = self.config, self.weights
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        norms = None
        if config.qk_norm:
            q_norm = weights.take(f"{attention}.q_norm.weight")
            k_norm = weights.take(f"{attention}.k_norm.weight")
            norms = (q_norm, k_norm, config.norm_eps)
        gate, up = (
            self.matrices.take(f"{mlp}.{name}_proj", self.part.inner) for name in ("gate", "up")
        )
        return Layer(
            index=index,
            input_norm=weights.take(f"{prefix}.input_layernorm.weight"),
            qkv=self._qkv(attention),
            qk_norms=norms,
            shape=AttentionShape(
                num_heads=self.part.num_heads,
                num_kv_heads=self.part.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.head_dim**-0.5,
                window=config.windows[index],
            ),
            o=self._summed(f"{attention}.o_proj", self.part.q, config.o_bias),
            post_norm=weights.take(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.ops.pack_gate_up(gate, up),
            down=self._summed(f"{mlp}.down_proj", self.part.inner, False),
        )

    def _qkv(self, attention: str) -> Linear:
        """[(nh + 2 nkv) hd, H] of this rank's heads."""
        parts = {"q": self.part.q, "k": self.part.kv, "v": self.part.kv}
        names = [(f"{attention}.{name}_proj", rows) for name, rows in parts.items()]
        take, has_bias = self.weights.take, self.config.qkv_bias
        return self.ops.pack_linear(
            [self.matrices.take(name, rows) for name, rows in names],
            [take(f"{name}.bias", rows) if has_bias else None for name, rows in names],
        )

    def _summed(self, name: str, columns: range, has_bias: bool) -> Linear:
        """A matrix whose products are summed over ranks, so that the bias is one rank's to add."""
        weight = self.matrices.take(name, None, columns)
        bias = self.weights.take(f"{name}.bias") if has_bias else None
        return self.ops.pack_linear([weight], [None if self.part.shard.rank else bias])


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
