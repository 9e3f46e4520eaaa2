"""The small set of fused operations a model is written in.

A model's forward pass is plain Python over this interface, written once. Two kinds of
implementation exist:

- eager (`torch_ops.TorchOps`): each call computes, on torch tensors. GPU (Triton attention inside,
  captured as a CUDA graph by the runner) and any machine without a compiled CPU library.
- recording (`cpu.CpuOps`): each call appends one fused kernel to a flat program over static
  buffers; the whole step is then replayed in one native call. The CPU's counterpart of a graph.

So a model may not look at values, branch on sizes of the step, or keep state between calls: it only
wires operations. Symbols used in shapes below:

    T tokens of the step (rows), S sequences of the step, R rows whose logits are wanted,
    H hidden size, V vocabulary, nh/nkv query/KV heads of this rank, hd head size.

The residual stream is float32 [T, H] whatever the model's dtype.

In a tensor-parallel group (`group.Group`) every rank runs the same operations over its own weights.
Three of them exchange: `embed` (a part of the vocabulary each), `linear_add` (a part of K each: the
products are summed over ranks, so one rank alone has the bias) and `logits` (joined on rank 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from quire.kernels.quantized import Matrix

T = TypeVar("T", int, "np.ndarray", "torch.Tensor")

Value = Any
"""An activation: a torch tensor (eager) or a handle to a static buffer (recording)."""

Linear = Any
"""A weight matrix in the form an Ops implementation packed it."""


@dataclass(frozen=True)
class StepInputs:
    """What one step computes, as flat int32 arrays (numpy; the ops copy or point at them).

    Rows of one sequence are consecutive and in position order; sequence s owns the rows
    [query_start[s], query_start[s+1]), whose positions end at context_lens[s] - 1.
    """

    token_ids: np.ndarray  # [T]; see `drawn_as` for those below zero
    positions: np.ndarray  # [T] absolute position of each token in its sequence
    query_start: np.ndarray  # [S + 1]
    context_lens: np.ndarray  # [S] tokens in the cache once this step's are written
    block_tables: np.ndarray  # [S, B] block id of each 16-token block; entries past the end unused
    logit_rows: np.ndarray  # [R] rows of T to compute logits for


def drawn_as(draw: T) -> T:
    """What stands in an array of token ids for a token that the host does not know yet, below zero:
    number `draw` of those drawn last, by a step that may still be under way."""
    return -1 - draw


def with_drawn(token_ids: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Token ids [T] with those that stand for a draw replaced by what was drawn [N]."""
    if min(token_ids.tolist(), default=0) >= 0:  # numpy would be slow to start: see Seats._go_on
        return token_ids
    stand_in = token_ids < 0
    token_ids = token_ids.copy()
    token_ids[stand_in] = drawn[drawn_as(token_ids[stand_in])]
    return token_ids


@dataclass(frozen=True)
class AttentionShape:
    """Heads of this rank and the rule of one layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    """Sliding window in tokens: a query at position p sees positions > p - window."""


@dataclass(frozen=True)
class Rope:
    """Rotary tables, for half-split ("NeoX") rotation of the first `rotary_dim` of a head."""

    cos: torch.Tensor  # [max_positions, rotary_dim / 2] float32, already scaled
    sin: torch.Tensor  # [max_positions, rotary_dim / 2] float32

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return 2 * self.cos.shape[1]


class Ops(Protocol):
    """Fused operations; `pack_*` at load time, the rest while the model runs or is recorded."""

    def pack_linear(self, weights: Sequence[Matrix], bias: Sequence[torch.Tensor | None]) -> Linear:
        """Stack [N_i, K] matrices along N (fused QKV is one call) into one packed [N, K].

        All floats, or all integers that were quantized alike (`quantized.QuantizedWeight`).
        """

    def pack_gate_up(self, gate: Matrix, up: Matrix) -> Linear:
        """Pack two [I, K] matrices for `gate_up_silu`."""

    def pack_embedding(self, table: torch.Tensor, vocabulary: int | None = None) -> Linear:
        """Pack a [V, H] table for `embed`; the same object serves `logits` when tied.

        In a group: this rank's `group.part_of` the rows of a table of `vocabulary` rows.
        """

    def pack_head(self, matrix: Matrix, vocabulary: int | None = None) -> Linear:
        """Pack a [V, H] matrix for `logits` alone, of floats or of integers."""

    def embed(self, table: Linear) -> Value:
        """Rows of the table for the step's token ids: [T, H] residual stream."""

    def rms_norm(self, x: Value, weight: torch.Tensor, eps: float) -> Value:
        """x / rms(x) * weight over the last dimension; result in the model's dtype."""

    def linear(self, x: Value, w: Linear) -> Value:
        """x @ w.T + bias: [rows, N]."""

    def linear_add(self, x: Value, w: Linear, residual: Value) -> Value:
        """residual + x @ w.T + bias. Consumes `residual`: use the returned value from here on."""

    def gate_up_silu(self, x: Value, w: Linear) -> Value:
        """silu(x @ gate.T) * (x @ up.T): [rows, I]."""

    def rope_and_cache(
        self,
        qkv: Value,
        layer: int,
        shape: AttentionShape,
        rope: Rope,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    ) -> Value:
        """Normalise (q_norm, k_norm, eps; per head) and rotate q and k, write k and v to the cache.

        qkv [T, (nh + 2*nkv) * hd] in the order q heads, k heads, v heads. Returns the value that
        `attention` takes.
        """

    def attention(self, qkv: Value, layer: int, shape: AttentionShape) -> Value:
        """Causal paged attention of the step's rows over their sequences' cache: [T, nh * hd]."""

    def take_logit_rows(self, x: Value) -> Value:
        """The rows of x [T, columns] whose logits are wanted: [R, columns]."""

    def logits(self, x: Value, w: Linear) -> Value:
        """x @ w.T in float32: [R, V]; on ranks beyond the first, something to be ignored."""
