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

import numpy as np

from quire.kernels.cpu import library as lib
from quire.kernels.cpu.program import (
    ACTIVATION_DTYPES,
    LOGIT_ROWS,
    TOKENS,
    Buffer,
    BufferPool,
    Program,
    StepLimits,
    Target,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quire.kernels.layout import KvLayout
    from quire.kernels.ops import AttentionShape, Rope

MAX_HEAD_DIM = 256


class _Epilogue(IntEnum):
    """Epilogue of csrc/cpu/kernels.h."""

    STORE = 0
    STORE_FLOAT = 1
    ADD_FLOAT = 2
    SILU_MUL = 3


@dataclass(frozen=True)
class PackedLinear:
    """A weight matrix [n, k] in panels, see csrc/cpu/gemm.h."""

    data: np.ndarray  # uint8
    bias: np.ndarray | None  # float32, [n] and zeros up to a multiple of 32
    n: int  # columns of the result; gate and up together for `gate_up_silu`
    k: int
    is_gate_up: bool = False


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
    return lib.huge_array(num_blocks * layout.block_bytes).reshape(num_blocks, layout.block_bytes)


def _dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in lib.DTYPE_CODES:
        raise TypeError(f"weights must be one of {sorted(lib.DTYPE_CODES)}, not {name}")
    return name


class CpuOps:
    """Packs weights and records a model's step for the compiled CPU kernels.

    `layout.dtype` is the model's: weights, cache and (bfloat16) activations between matmuls. The
    residual stream is float32.
    """

    def __init__(self, layout: KvLayout, limits: StepLimits, team: lib.Team) -> None:
        """Raise ValueError for a layout that the kernels do not read."""
        check_layout(layout)
        self._library = lib.load()
        self._layout, self._limits, self._team = layout, limits, team
        self._activation = ACTIVATION_DTYPES[layout.dtype]
        self._weights = lib.Arena()
        self._buffers = BufferPool((limits.max_tokens, limits.max_logit_rows))
        self._recorded: list[lib.Op] = []
        self._keep: list[object] = []

    @property
    def memory(self) -> MemoryUse:
        """Bytes in use by packed weights and recorded buffers."""
        return MemoryUse(weights=self._weights.used, activations=self._buffers.used)

    # ---- weights --------------------------------------------------------------------------------

    def pack_linear(
        self, weights: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None] = ()
    ) -> PackedLinear:
        """Stack [N_i, K] matrices along N and pack them, with a bias each or none.

        Sources are read once, in order, straight from where they lie (a mapped file). Raises
        ValueError for shapes that do not fit, TypeError for other dtypes than the three.
        """
        n, k = sum(len(weight) for weight in weights), int(weights[0].shape[1])
        packed = self._allocate(n, k, self._stack_bias(weights, bias))
        first = 0
        for weight in weights:
            self._pack(weight, packed, first, 16)
            first += len(weight)
        return packed

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        """Interleave two [I, K] matrices by 16 rows, so that a panel holds both of 16 outputs."""
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must agree")
        packed = self._allocate(2 * len(gate), int(gate.shape[1]), None, is_gate_up=True)
        self._pack(gate, packed, 0, 32)
        self._pack(up, packed, 16, 32)
        return packed

    def pack_embedding(self, table: torch.Tensor) -> PackedLinear:
        """Pack a [V, H] table; the same object serves `embed` and, tied, `logits`."""
        return self.pack_linear([table])

    def _allocate(
        self, n: int, k: int, bias: np.ndarray | None, *, is_gate_up: bool = False
    ) -> PackedLinear:
        dtype = self._layout.dtype
        elements = self._library.quire_packed_elements(lib.DTYPE_CODES[dtype], n, k)
        data = self._weights.take(elements * lib.NUMPY_DTYPES[dtype].itemsize)
        return PackedLinear(data, bias, n, k, is_gate_up)

    def _pack(self, weight: torch.Tensor, packed: PackedLinear, first: int, step: int) -> None:
        if weight.ndim != 2 or weight.shape[1] != packed.k:
            raise ValueError(f"expected a matrix [N, {packed.k}], not {tuple(weight.shape)}")
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        source = lib.PackSource(
            weight.data_ptr(),
            lib.DTYPE_CODES[_dtype_name(weight)],
            len(weight),
            packed.k,
            weight.stride(0),
        )
        destination = lib.PackDestination(
            packed.data.ctypes.data, lib.DTYPE_CODES[self._layout.dtype], first, step
        )
        self._library.quire_pack(self._team.handle, source, destination)

    def _stack_bias(
        self, weights: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None]
    ) -> np.ndarray | None:
        if all(part is None for part in bias):
            return None
        n = sum(len(weight) for weight in weights)
        stacked = self._weights.take(32 * -(-n // 32) * 4).view(np.float32)
        first = 0
        for weight, part in zip(weights, bias, strict=True):
            if part is not None:
                stacked[first : first + len(weight)] = self._floats(part, len(weight))
            first += len(weight)
        return stacked

    def _floats(self, tensor: torch.Tensor, size: int) -> np.ndarray:
        """A vector [size] as float32."""
        if tensor.shape != (size,):
            raise ValueError(f"expected a vector [{size}], not {tuple(tensor.shape)}")
        vector: np.ndarray = tensor.detach().float().contiguous().numpy()
        return vector

    def _address(self, array: np.ndarray) -> int:
        """Address of an array that will be kept alive with the program."""
        self._keep.append(array)
        return int(array.ctypes.data)

    # ---- recording ------------------------------------------------------------------------------

    def input(
        self, columns: int, dtype: str | None = None, *, of_logit_rows: bool = False
    ) -> Buffer:
        """A buffer that the caller fills through `.array` before each run.

        float32 or, by default, the dtype of activations.
        """
        domain = LOGIT_ROWS if of_logit_rows else TOKENS
        return self._buffers.take(domain, columns, dtype or self._activation)

    def embed(self, table: PackedLinear) -> Buffer:
        """Rows of the table for the step's token ids: float32 [T, H]."""
        out = self._buffers.take(TOKENS, table.k, "float32")
        address = self._address(table.data)
        self._record(lib.EmbedArgs(address, table.n, table.k, out.matrix), TOKENS)
        return out

    def rms_norm(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        """x / rms(x) * weight in float32, rounded to the activations' dtype: [rows, H]."""
        self._expect(x, "float32")
        out = self._buffers.take(x.domain, x.columns, self._activation)
        address = self._address(self._floats(weight, x.columns))
        self._record(lib.RmsNormArgs(x.matrix, out.matrix, address, x.columns, eps), x.domain)
        return out

    def linear(self, x: Buffer, w: PackedLinear) -> Buffer:
        """x @ w.T + bias in the activations' dtype: [rows, N]."""
        out = self._buffers.take(x.domain, w.n, self._activation)
        return self._record_linear(x, w, out, _Epilogue.STORE)

    def linear_add(self, x: Buffer, w: PackedLinear, residual: Buffer) -> Buffer:
        """residual + x @ w.T + bias, in place: the returned value is `residual` itself."""
        self._expect(residual, "float32")
        if residual.columns != w.n or residual.domain != x.domain:
            raise ValueError(f"residual must be [rows, {w.n}]")
        return self._record_linear(x, w, residual, _Epilogue.ADD_FLOAT)

    def gate_up_silu(self, x: Buffer, w: PackedLinear) -> Buffer:
        """silu(x @ gate.T) * (x @ up.T): [rows, I]."""
        if not w.is_gate_up:
            raise ValueError("weights must come from pack_gate_up")
        out = self._buffers.take(x.domain, w.n // 2, self._activation)
        return self._record_linear(x, w, out, _Epilogue.SILU_MUL)

    def logits(self, x: Buffer, w: PackedLinear) -> Buffer:
        """x @ w.T in float32, without gaps between rows: [R, V]."""
        out = self._buffers.take(x.domain, w.n, "float32", padded=False)
        return self._record_linear(x, w, out, _Epilogue.STORE_FLOAT)

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
            None if norm is None else self._address(self._floats(norm, shape.head_dim))
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
        """The rows of x [T, H] whose logits are wanted: [R, H], same dtype."""
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
        program = Program(target, self._recorded, result, (self._buffers, self._keep))
        self._recorded, self._keep = [], []
        return program

    def _record(self, args: lib.OpArgs, domain: int) -> None:
        self._recorded.append(lib.Op.of(args, domain))

    def _record_linear(
        self, x: Buffer, w: PackedLinear, out: Buffer, epilogue: _Epilogue
    ) -> Buffer:
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
        self._record(args, x.domain)
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
