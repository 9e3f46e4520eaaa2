"""A Llama in plain torch whose parameter names are those of the Hugging Face format.

Symbols used in the shape comments:
    B  sequences in the batch        T  tokens per sequence      V  vocabulary
    D  hidden size                   H  query heads              K  key/value heads
    d  head dimension
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The dimensions of the model; all are multiples of 32, the tile edge of AMX."""

    vocab_size: int = 8192
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1024
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale [D]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; computed in float32."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight.float()).to(x.dtype)


def rope_tables(
    shape: LlamaShape, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each [num_positions, d], float32."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = shape.rope_theta ** (-exponents / shape.head_dim)  # [d / 2]
    positions = torch.arange(num_positions, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)  # [T, d]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, heads, T, d] in the rotate-half convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        query_dim = shape.num_heads * shape.head_dim
        kv_dim = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # [B, H, T, d]
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # [B, K, T, d]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, T, d]
        groups = self.shape.num_heads // self.shape.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, d]
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class FeedForward(nn.Module):
    """The gated SiLU feed-forward block."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm; named `model` in the checkpoint."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] token ids -> [B, T, D] final hidden states."""
        x = self.embed_tokens(token_ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = rope_tables(self.shape, token_ids.shape[1], token_ids.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """A causal language model with tied input and output embeddings."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.apply(self._initialise)
        residual_std = 0.02 / (2 * shape.num_layers) ** 0.5
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=residual_std)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] token ids -> [B, T, V] logits."""
        return F.linear(self.model(token_ids), self.model.embed_tokens.weight)

    def loss(self, token_ids: Tensor, targets: Tensor, z_weight: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T], plus z_weight * mean(logsumexp^2)."""
        logits = self(token_ids).flatten(0, 1).float()  # [B * T, V]
        cross_entropy = F.cross_entropy(logits, targets.flatten())
        regularizer: Tensor = z_weight * logits.logsumexp(-1).square().mean()
        return cross_entropy + regularizer

    def num_parameters(self) -> int:
        """Weights stored in the checkpoint; the tied embedding counts once."""
        return sum(weight.numel() for weight in self.parameters())
