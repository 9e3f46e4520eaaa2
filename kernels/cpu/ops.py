"""The recording implementation of `quire.kernels.ops.Ops` for the CPU.

    ops = CpuOps(layout, limits, Team())
    ...                                   # the model packs its weights, then records its forward
    program = ops.finish(logits, alloc_pool(layout, num_blocks))
    program.run(inputs)                   # float32 [R, V]

Nothing is computed while recording. Each operation is one fused kernel of `csrc/cpu`; a row's
result has the same bits whichever rows share its step, however its prompt was chunked and whatever
the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from quire.kernels.cpu import library as lib
from quire.kernels.cpu.exchange import Exchange
from quire.kernels.cpu.memory import huge_array
from quire.kernels.cpu.packing import PackedLinear, PackedTable, Packer, floats
from quire.kernels.cpu.program import (
    ACTIVATION_DTYPES,
    LOGIT_ROWS,
    TOKENS,
    Buffer,
    BufferPool,
    Program,
    Recording,
    StepLimits,
    Target,
)
from quire.kernels.cpu.quantized import PackedQuantized, norm_into
from quire.kernels.group import ALONE

if TYPE_CHECKING:
    import numpy as np
    import torch

    from quire.kernels.group import Group
    from quire.kernels.layout import KvLayout
    from quire.kernels.ops import AttentionShape, Rope

AnyLinear = PackedLinear | PackedQuantized

MAX_HEAD_DIM = 256


class _Epilogue(IntEnum):
    """Epilogue of csrc/cpu/kernels.h."""

    STORE = 0
    STORE_FLOAT = 1
    ADD_FLOAT = 2
    SILU_MUL = 3


@dataclass(frozen=True)
class MemoryUse:
    """Bytes held by one CpuOps, the cache not included."""

    weights: int
    activations: int


def check_layout(layout: KvLayout) -> None:
    """Raise ValueError for a layout that the kernels do not read."""
    order = lib.KV_ORDERS[layout.dtype]
    if layout.order is not order:
        raise ValueError(f"the CPU kernels keep {layout.dtype} in {order}, not {layout.order}")
    if layout.head_dim > MAX_HEAD_DIM or layout.head_dim % 2:
        raise ValueError(f"head_dim must be even and at most {MAX_HEAD_DIM}")


def alloc_pool(layout: KvLayout, num_blocks: int) -> np.ndarray:
    """A KV pool uint8 [num_blocks, block_bytes] on huge pages, zero until written.

    Raises MemoryError, or ValueError for a layout that the kernels do not read.
    """
    check_layout(layout)
    return huge_array(num_blocks * layout.block_bytes).reshape(num_blocks, layout.block_bytes)


class CpuOps(Packer):
    """Packs weights and records a model's step for the compiled CPU kernels.

    `layout.dtype` is the model's: weights, cache and (bfloat16) activations between matmuls. The
    residual stream is float32.
    """

    def __init__(
        self, layout: KvLayout, limits: StepLimits, team: lib.Team, group: Group = ALONE
    ) -> None:
        """Raise ValueError for a layout that the kernels do not read."""
        check_layout(layout)
        super().__init__(layout.dtype, team, group)
        self._layout, self._limits = layout, limits
        self._activation = ACTIVATION_DTYPES[layout.dtype]
        self._buffers = BufferPool((limits.max_tokens, limits.max_logit_rows))
        self._recorded: list[lib.Op] = []
        self._exchanges: list[Exchange] = []
        self._keep: list[object] = []

    @property
    def memory(self) -> MemoryUse:
        """Bytes in use by packed weights and recorded buffers."""
        return MemoryUse(weights=self._weights.used, activations=self._buffers.used)

    def _address(self, array: np.ndarray) -> int:
        """Address of an array that will be kept alive with the program."""
        self._keep.append(array)
        return int(array.ctypes.data)

    def input(
        self, columns: int, dtype: str | None = None, *, of_logit_rows: bool = False
    ) -> Buffer:
        """A buffer that the caller fills through `.array` before each run.

        float32 or, by default, the dtype of activations.
        """
        domain = LOGIT_ROWS if of_logit_rows else TOKENS
        return self._buffers.take(domain, columns, dtype or self._activation)

    def embed(self, table: PackedTable) -> Buffer:
        """Rows of the table for the step's token ids: float32 [T, H]."""
        is_part = self._group.size > 1
        own = self._buffers.take(TOKENS, table.k, "float32", padded=not is_part)
        args = lib.EmbedArgs(
            table=self._address(table.data),
            rows=table.n,
            columns=table.k,
            out=own.matrix,
            first=table.first,
            vocabulary=table.vocabulary,
        )
        self._record(args, TOKENS)
        if not is_part:
            return own
        return self._sum(own, self._buffers.take(TOKENS, table.k, "float32"), accumulate=False)

    def rms_norm(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        """x / rms(x) * weight in float32, rounded to the activations' dtype: [rows, H]."""
        self._expect(x, "float32")
        out = self._buffers.take(x.domain, x.columns, self._activation)
        address = self._address(floats(weight, x.columns))
        self._record(lib.RmsNormArgs(x.matrix, out.matrix, address, x.columns, eps), x.domain)
        return out

    def linear(self, x: Buffer, w: AnyLinear) -> Buffer:
        """x @ w.T + bias in the activations' dtype: [rows, N]."""
        out = self._buffers.take(x.domain, w.n, self._activation)
        return self._record_linear(x, w, out, _Epilogue.STORE)

    def linear_add(self, x: Buffer, w: AnyLinear, residual: Buffer) -> Buffer:
        """residual + x @ w.T + bias, in place: the returned value is `residual` itself."""
        self._expect(residual, "float32")
        if residual.columns != w.n or residual.domain != x.domain:
            raise ValueError(f"residual must be [rows, {w.n}]")
        if self._group.size == 1:
            return self._record_linear(x, w, residual, _Epilogue.ADD_FLOAT)
        own = self._buffers.take(x.domain, w.n, "float32", padded=False)
        self._record_linear(x, w, own, _Epilogue.STORE_FLOAT)
        return self._sum(own, residual, accumulate=True)

    def gate_up_silu(self, x: Buffer, w: AnyLinear) -> Buffer:
        """silu(x @ gate.T) * (x @ up.T): [rows, I]."""
        if not w.is_gate_up:
            raise ValueError("weights must come from pack_gate_up")
        out = self._buffers.take(x.domain, w.n // 2, self._activation)
        return self._record_linear(x, w, out, _Epilogue.SILU_MUL)

    def logits(self, x: Buffer, w: PackedTable | PackedQuantized) -> Buffer:
        """x @ w.T in float32: [R, V]; on ranks beyond the first this rank's columns of it."""
        own = self._buffers.take(x.domain, w.n, "float32", padded=False)
        self._record_linear(x, w, own, _Epilogue.STORE_FLOAT)
        if self._group.size == 1:
            return own
        parts = self._exchange(own, is_for_all=False)
        if self._group.rank:
            return own
        joined = self._buffers.take(x.domain, parts.columns, "float32", padded=False)
        self._record(lib.JoinColumnsArgs(*self._parts(parts), joined.matrix), x.domain)
        return joined.narrow(w.vocabulary)

    def _exchange(self, part: Buffer, *, is_for_all: bool) -> Buffer:
        """The program stops here until every rank's `part` is in the returned buffer."""
        columns = self._group.size * part.columns
        parts = self._buffers.take(part.domain, columns, "float32", padded=False)
        self._exchanges.append(
            Exchange(
                before=len(self._recorded),
                group=self._group,
                domain=part.domain,
                part=part.array,
                parts=parts.array,
                is_for_all=is_for_all,
            )
        )
        return parts

    def _sum(self, part: Buffer, out: Buffer, *, accumulate: bool) -> Buffer:
        """`out`, with the sum of all ranks' `part` in it, or added to what it holds."""
        parts = self._exchange(part, is_for_all=True)
        self._record(lib.SumPartsArgs(*self._parts(parts), out.matrix, accumulate), out.domain)
        return out

    def _parts(self, parts: Buffer) -> tuple[int, int, int]:
        """Address, number and columns of what the ranks gave."""
        size = self._group.size
        return self._address(parts.array), size, parts.columns // size

    def rope_and_cache(
        self,
        qkv: Buffer,
        layer: int,
        shape: AttentionShape,
        rope: Rope,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    ) -> Buffer:
        """Normalise and rotate q and k in place, write k and v to the cache; returns `qkv`."""
        self._expect_heads(qkv, layer, shape)
        if rope.rotary_dim > shape.head_dim:
            raise ValueError(f"rotary_dim {rope.rotary_dim} exceeds head_dim {shape.head_dim}")
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        q_floats, k_floats = (
            None if norm is None else self._address(floats(norm, shape.head_dim))
            for norm in (q_norm, k_norm)
        )
        cos, sin = (
            self._address(table.float().contiguous().numpy()) for table in (rope.cos, rope.sin)
        )
        args = lib.RopeArgs(
            qkv=qkv.matrix,
            shape=self._heads(layer, shape),
            cos=cos,
            sin=sin,
            q_norm=q_floats,
            k_norm=k_floats,
            max_positions=len(rope.cos),
            rotary_dim=rope.rotary_dim,
            eps=eps,
        )
        self._record(args, TOKENS)
        return qkv

    def attention(self, qkv: Buffer, layer: int, shape: AttentionShape) -> Buffer:
        """Causal paged attention over the cache: [T, nh * hd] in the activations' dtype."""
        self._expect_heads(qkv, layer, shape)
        if shape.window is not None and shape.window < 1:
            raise ValueError("a sliding window holds at least one token")
        out = self._buffers.take(TOKENS, shape.num_heads * shape.head_dim, self._activation)
        args = lib.AttentionArgs(
            qkv.matrix, out.matrix, self._heads(layer, shape), shape.window or 0, shape.scale
        )
        self._record(args, TOKENS)
        return out

    def take_logit_rows(self, x: Buffer) -> Buffer:
        """The rows of x [T, columns] whose logits are wanted: [R, columns], same dtype."""
        if x.domain != TOKENS:
            raise ValueError("logit rows were taken already")
        out = self._buffers.take(LOGIT_ROWS, x.columns, x.dtype)
        source, destination = (
            lib.Matrix(buffer.array.ctypes.data, buffer.array.strides[0]) for buffer in (x, out)
        )
        row_bytes = x.columns * x.array.itemsize
        self._record(lib.TakeRowsArgs(source, destination, row_bytes), LOGIT_ROWS)
        return out

    def finish(self, result: Buffer, pool: np.ndarray) -> Program:
        """End the recording: the program over `pool` whose run returns `result`.

        Another may be recorded next, with the same weights. Raises ValueError for a pool that does
        not fit the layout.
        """
        target = Target(self._team, self._layout, pool, self._limits)
        recording = Recording(self._recorded, self._exchanges, result)
        program = Program(target, recording, (self._buffers, self._keep))
        self._recorded, self._exchanges, self._keep = [], [], []
        return program

    def _record(self, args: lib.OpArgs, domain: int) -> None:
        self._recorded.append(lib.Op.of(args, domain))

    def _record_linear(self, x: Buffer, w: AnyLinear, out: Buffer, epilogue: _Epilogue) -> Buffer:
        self._expect(x, self._activation)
        if x.columns != w.k:
            raise ValueError(f"weights [{w.n}, {w.k}] cannot take {x.columns} columns")
        if w.is_gate_up != (epilogue is _Epilogue.SILU_MUL):
            raise ValueError("weights from pack_gate_up serve gate_up_silu alone")
        args = lib.LinearArgs(
            weights=self._address(w.data),
            bias=None if w.bias is None else self._address(w.bias),
            input=x.matrix,
            out=out.matrix,
            k=w.k,
            n=w.n,
            epilogue=epilogue,
        )
        if isinstance(w, PackedQuantized):
            args.input = self._fixed_point(x, w).matrix
            self._record(w.args(args), x.domain)
        else:
            self._record(args, x.domain)
        return out

    def _fixed_point(self, x: Buffer, w: PackedQuantized) -> Buffer:
        """The activations in the form that the weights multiply."""
        out = self._buffers.take(x.domain, w.fixed_columns, "int16")
        order = None if w.order is None else self._address(w.order)
        args = lib.FixedPointArgs(x.matrix, out.matrix, order, w.k, w.block)
        norm = norm_into(self._recorded[-1], x.matrix) if self._recorded else None
        if norm is None:
            self._record(args, x.domain)
        else:  # the two in one pass over the rows
            self._recorded[-1] = lib.Op.of(lib.NormFixedPointArgs(norm, args), x.domain)
        return out

    def _expect(self, x: Buffer, dtype: str) -> None:
        if x.dtype != dtype:
            raise TypeError(f"expected a value in {dtype}, not {x.dtype}")

    def _expect_heads(self, qkv: Buffer, layer: int, shape: AttentionShape) -> None:
        layout = self._layout
        self._expect(qkv, self._activation)
        if (shape.num_kv_heads, shape.head_dim) != (layout.num_kv_heads, layout.head_dim):
            raise ValueError(f"heads {shape} do not fit the cache {layout}")
        if not 0 <= layer < layout.num_layers:
            raise ValueError(f"layer {layer} outside the cache's {layout.num_layers}")
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError("KV heads must divide the query heads")
        columns = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        if qkv.domain != TOKENS or qkv.columns != columns:
            raise ValueError(f"qkv must be [T, {columns}]")

    def _heads(self, layer: int, shape: AttentionShape) -> lib.HeadShape:
        return lib.HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, layer)
