"""The operations of `ops.Ops` computed at once on torch tensors: any device torch has.

Life of a `TorchOps`: construct it with the cache it owns; `pack_*` while weights load; then for
every step `begin(StepInputs)`, which moves the step's arrays to the device in one transfer, and the
model's forward pass over the operations, which returns the logits.

On CUDA norms, cache write and attention are the Triton kernels of `quire.kernels.triton` (imported
on that path only). Elsewhere they are vectorised torch: the fallback for a CPU without a compiler.
The cache is in `KvOrder.PLAIN`. The residual stream is float32 [T, H], as on the recording path.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from quire.kernels.group import ALONE, part_of
from quire.kernels.layout import KvLayout, KvOrder
from quire.kernels.ops import Rope, drawn_as
from quire.kernels.quantized import split_kinds, stack
from quire.kernels.reference import LayerCache, cache_slots
from quire.kernels.staging import put, to_device
from quire.kernels.torch_kernels import TorchKernels
from quire.kernels.torch_quantized import StoredQuantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.kernels.group import Group
    from quire.kernels.ops import AttentionShape, StepInputs
    from quire.kernels.quantized import Matrix
    from quire.kernels.reference import QkNorms
    from quire.kernels.sampling import SamplingBatch

LOGIT_CHUNK = 1 << 20
"""Weights converted to float32 at a time for logits on CPU: what stays in a core's cache."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight [N, K] with its bias [N], on the ops' device."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class PackedTable(PackedLinear):
    """Rows [first, first + N) of an embedding of `vocabulary` rows; rows past the end are zero."""

    first: int = 0
    vocabulary: int = 0


AnyLinear = PackedLinear | StoredQuantized
AnyTable = PackedTable | StoredQuantized


@dataclass(frozen=True)
class Step:
    """The arrays of one step: int32 on the device, and the originals for what the host decides."""

    inputs: StepInputs | None
    """None where the arrays are static buffers, whose values are not known when a graph is captured
    over them: then every sequence has one row."""
    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    block: torch.Tensor  # [T] block of the pool each row is written to
    slot: torch.Tensor  # [T] slot in that block
    logit_rows: torch.Tensor  # [R]
    block_tables: torch.Tensor  # [S, B]
    plans: dict[object, object] = field(default_factory=dict)
    """What the kernels derive from the arrays once per step and share between layers."""

    @classmethod
    def of(cls, inputs: StepInputs, device: torch.device) -> Step:
        """Move the arrays in one transfer; the views below are slices of it."""
        _, block, slot = cache_slots(inputs)
        parts = [
            inputs.token_ids,
            inputs.positions,
            block,
            slot,
            inputs.logit_rows,
            inputs.block_tables,
        ]
        tokens, positions, blocks, slots, logit_rows, tables = put(parts, device)
        return cls(inputs, tokens, positions, blocks, slots, logit_rows, tables)

    @property
    def host(self) -> StepInputs:
        """The originals. Raises RuntimeError on a step over static buffers."""
        if self.inputs is None:
            raise RuntimeError("these kernels read the step on the host: they cannot be captured")
        return self.inputs


@dataclass
class Residual:
    """The residual stream, and a product that the next norm adds to it while it reads both."""

    stream: torch.Tensor  # [rows, H] float32
    product: torch.Tensor | None = None  # [rows, H]

    def settle(self) -> torch.Tensor:
        """The stream with the product in it."""
        if self.product is not None:
            self.stream += self.product
            self.product = None
        return self.stream

    def __getitem__(self, rows: torch.Tensor) -> Residual:
        """Copies of some rows."""
        return Residual(self.stream[rows], None if self.product is None else self.product[rows])


Rows = TypeVar("Rows", torch.Tensor, Residual)


@dataclass(frozen=True)
class HeadRule:
    """What happens to the heads of q and k before attention in one layer."""

    shape: AttentionShape
    rope: Rope
    norms: QkNorms | None


class StepKernels(Protocol):
    """The operations with a hand-written form on some device."""

    def rms_norm(
        self, x: Residual, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """Settle x, and normalise it in float32; result [rows, H] in `dtype`."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [rows, 2 I], gate first: [rows, I]."""

    def rope_and_cache(
        self, qkv: torch.Tensor, cache: LayerCache, step: Step, rule: HeadRule
    ) -> torch.Tensor:
        """Normalise and rotate q and k, write k and v to the cache: q [T, nh, hd]."""

    def attention(
        self, q: torch.Tensor, cache: LayerCache, step: Step, shape: AttentionShape
    ) -> torch.Tensor:
        """Attention of q [T, nh, hd] over the cache: [T, nh, hd]."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Draw tokens of logits [R, V]: int32 [2, N], token and whether there was none to draw."""


def step_kernels(use_triton: bool) -> StepKernels:
    """The kernels of a device. Raises ImportError where Triton is asked for and absent."""
    if not use_triton:
        return TorchKernels()
    from quire.kernels.triton.kernels import TritonKernels

    return TritonKernels()


class TorchOps:
    """Eager operations over a cache of `num_blocks` blocks in `pool`.

    `pool` [num_blocks, nkv, layers, 2, 16 * hd] belongs to this object and is zero at first.
    Raises ValueError for a layout that is not `KvOrder.PLAIN`.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        use_triton: bool | None = None,
        group: Group = ALONE,
    ) -> None:
        """`use_triton` None means on CUDA only; True elsewhere needs Triton's interpreter."""
        if layout.order is not KvOrder.PLAIN:
            raise ValueError(f"TorchOps reads KvOrder.PLAIN, not {layout.order!r}")
        self.layout = layout
        self.group = group
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        self.kernels = step_kernels(
            self.device.type == "cuda" if use_triton is None else use_triton
        )
        self.pool = torch.zeros(
            (num_blocks, *layout.block_shape), dtype=self.dtype, device=self.device
        )
        self.device = self.pool.device  # with its index
        self.drawn = torch.empty(0, dtype=torch.int32, device=self.device)
        """Tokens [N] drawn last, which the ids of a step may stand for."""
        self._step: Step | None = None
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- load time --------------------------------------------------------------------------------

    def pack_linear(
        self, weights: Sequence[Matrix], bias: Sequence[torch.Tensor | None]
    ) -> AnyLinear:
        """Stack [N_i, K] matrices along N. A missing bias beside a present one counts as zero."""
        if all(b is None for b in bias):
            return self._pack(weights)
        rows = [
            torch.zeros(len(w)) if b is None else b.float()
            for w, b in zip(weights, bias, strict=True)
        ]
        return self._pack(weights, self._own(torch.cat(rows)))

    def pack_gate_up(self, gate: Matrix, up: Matrix) -> AnyLinear:
        """Stack two [I, K] matrices: [2 I, K], gate first."""
        return self._pack([gate, up])

    def _pack(self, weights: Sequence[Matrix], bias: torch.Tensor | None = None) -> AnyLinear:
        floats, integers = split_kinds(weights)
        if integers:
            return StoredQuantized.of(stack(integers), bias, self.dtype, self.device)
        return PackedLinear(self._own(torch.cat(floats)), bias)

    def pack_embedding(self, table: torch.Tensor, vocabulary: int | None = None) -> PackedTable:
        """A [V, H] table for `embed` and `logits`, or this rank's rows of `vocabulary` in all."""
        total = len(table) if vocabulary is None else vocabulary
        own = part_of(total, self.group.rank, self.group.size)
        # every rank's logits are as wide as the first one's
        missing = len(part_of(total, 0, self.group.size)) - len(own)
        return PackedTable(
            self._own(F.pad(table, (0, 0, 0, missing))), first=own.start, vocabulary=total
        )

    def pack_head(self, matrix: Matrix, vocabulary: int | None = None) -> AnyTable:
        """A [V, H] matrix for `logits`, or this rank's rows of `vocabulary` in all."""
        if isinstance(matrix, torch.Tensor):
            return self.pack_embedding(matrix, vocabulary)
        total = len(matrix) if vocabulary is None else vocabulary
        missing = len(part_of(total, 0, self.group.size)) - len(matrix)
        packed = StoredQuantized.of(matrix.padded(missing), None, self.dtype, self.device)
        return replace(packed, vocabulary=total)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the ops' device, copied there once (a norm's weight, a rope table)."""
        if tensor.device == self.device:
            return tensor
        # the original is kept too, so that its id is not given to another tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = (tensor, tensor.to(self.device))
        return self._copies[id(tensor)][1]

    # --- a step -----------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """The step in progress. Raises RuntimeError before the first `begin`."""
        if self._step is None:
            raise RuntimeError("begin(StepInputs) must come before the operations")
        return self._step

    def begin(self, inputs: StepInputs) -> None:
        """Start a step: put its arrays on the device."""
        step = Step.of(inputs, self.device)
        self._step = replace(step, token_ids=self.known(step.token_ids, inputs.token_ids))

    def known(self, token_ids: torch.Tensor, on_host: np.ndarray) -> torch.Tensor:
        """Token ids [T], also given as the host has them, with those that stand for a draw replaced
        by what was drawn."""
        if not (on_host < 0).any():
            return token_ids
        draws = drawn_as(token_ids).clamp(min=0)
        return torch.where(token_ids < 0, self.drawn.index_select(0, draws), token_ids)

    def begin_static(self, step: Step) -> None:
        """Start a step over arrays that are on the device already."""
        self._step = step

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy blocks, pairs [n, 2] of (source, destination), as if one after the other."""
        # a copy at once reads every source first, which differs where one is also written
        is_chained = bool(np.isin(pairs[:, 0], pairs[:, 1]).any())
        index = to_device(pairs.astype(np.int64), self.device)
        for part in torch.split(index, 1) if is_chained else (index,):
            self.pool[part[:, 1]] = self.pool[part[:, 0]]

    def embed(self, table: PackedTable) -> Residual:
        """Rows of the table for the step's tokens: float32 [T, H]."""
        if self.group.size == 1:
            return Residual(F.embedding(self.step.token_ids, table.weight).float())
        ids = self.step.token_ids - table.first
        is_own = (ids >= 0) & (ids < len(table.weight))
        own = F.embedding(ids.where(is_own, 0), table.weight)
        return Residual(self.group.sum(own.where(is_own[:, None], 0.0)))

    def rms_norm(self, x: Residual, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise the residual stream in float32; result [rows, H] in the model's dtype."""
        return self.kernels.rms_norm(x, self._here(weight), eps, self.dtype)

    def linear(self, x: torch.Tensor, w: AnyLinear) -> torch.Tensor:
        """x [rows, K] @ w.T + bias: [rows, N]."""
        return F.linear(x, w.weight, w.bias)

    def linear_add(self, x: torch.Tensor, w: AnyLinear, residual: Residual) -> Residual:
        """Add x @ w.T + bias to the residual [rows, N]: when the next norm reads it."""
        product = F.linear(x, w.weight, w.bias)
        whole = product if self.group.size == 1 else self.group.sum(product)
        return Residual(residual.settle(), whole)

    def gate_up_silu(self, x: torch.Tensor, w: AnyLinear) -> torch.Tensor:
        """silu(x @ gate.T) * (x @ up.T): [rows, I]."""
        return self.kernels.silu_mul(F.linear(x, w.weight))

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        layer: int,
        shape: AttentionShape,
        rope: Rope,
        norms: QkNorms | None = None,
    ) -> torch.Tensor:
        """Normalise and rotate q and k, write k and v: q [T, nh, hd], which `attention` takes."""
        if norms is not None:
            norms = (self._here(norms[0]), self._here(norms[1]), norms[2])
        rule = HeadRule(shape, Rope(self._here(rope.cos), self._here(rope.sin)), norms)
        return self.kernels.rope_and_cache(qkv, self._cache(layer), self.step, rule)

    def attention(self, qkv: torch.Tensor, layer: int, shape: AttentionShape) -> torch.Tensor:
        """Attention of the q [T, nh, hd] that `rope_and_cache` returned: [T, nh * hd]."""
        return self.kernels.attention(qkv, self._cache(layer), self.step, shape).flatten(1)

    def _cache(self, layer: int) -> LayerCache:
        return LayerCache(self.pool, self.layout, layer)

    def take_logit_rows(self, x: Rows) -> Rows:
        """The rows of x [T, columns] whose logits are wanted: [R, columns]."""
        return x[self.step.logit_rows]

    def logits(self, x: torch.Tensor, w: AnyTable) -> torch.Tensor:
        """x [R, H] @ w.T in float32: [R, V]; on ranks beyond the first this rank's columns."""
        return self.group.join(self._logits(x, w))[:, : w.vocabulary]

    def _logits(self, x: torch.Tensor, w: AnyTable) -> torch.Tensor:
        weight = w.weight
        if weight.dtype == torch.float32:
            return F.linear(x, weight)
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        # CPU matmuls round their result to bf16, which would tie many logits: widen the weights
        out = torch.empty(x.shape[0], weight.shape[0])
        rows = max(1, LOGIT_CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows].float()
            torch.mm(x.float(), part.T, out=out[:, start : start + rows])
        return out
