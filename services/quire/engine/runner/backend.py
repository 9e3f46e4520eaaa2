"""The ways a step is computed, behind one small interface.

A backend's life: `ops` packs the weights while the model is built over it; `allocate` gives it the
KV pool and makes the model's step ready to run; then `sampler`, `compute` and `fetch`, step after
step. The tokens that are drawn stay where they are drawn too: the next `compute` may name them
(`ops.drawn_as`) before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from quire.engine.runner.memory import available_host_bytes
from quire.engine.runner.pool_copies import PoolCopies
from quire.kernels import numerics, torch_sampler
from quire.kernels.cpu import KV_ORDERS, CpuOps, StepLimits, Team, alloc_pool
from quire.kernels.cpu.sampler import CpuSampler
from quire.kernels.group import ALONE
from quire.kernels.layout import KvLayout, KvOrder
from quire.kernels.ops import with_drawn
from quire.kernels.staging import fetch, to_device
from quire.kernels.torch_ops import TorchOps
from quire.transfer.layout import Shard, heads_of
from quire.transfer.memory import HostMemory
from quire.transfer.staging import StagedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.engine.models.config import ModelConfig
    from quire.engine.models.llama import Llama
    from quire.kernels.cpu import Program
    from quire.kernels.group import Group
    from quire.kernels.ops import Ops, StepInputs
    from quire.kernels.sampling import SamplingBatch
    from quire.transfer.memory import PoolMemory

Logits = Any
"""[R, V] float32, in the backend's own array type; valid until the next step."""

Arrays = tuple[Any, ...]
"""Arrays in the backend's own type, perhaps still being computed."""

Sampler = Callable[[Logits], Arrays]
"""Draws a step's tokens: [N] int32; and [N], not zero where a draw had no finite logit."""

Fetched = Callable[[], list[list[np.ndarray]]]
"""Waits for groups of arrays, and returns copies on the host."""

__all__ = ["Backend", "CpuBackend", "Logits", "Sampler", "StepLimits", "TorchBackend"]


class Backend(Protocol):
    """What the runner needs of a device."""

    layout: KvLayout
    device_type: str
    """cpu or cuda."""
    numerics: str
    """See `quire.kernels.numerics`."""
    is_batch_invariant: bool
    """A row's logits are the same bits whatever shares its step and however its prompt was cut."""
    returns_early: bool
    """Steps run on after `compute` and the sampler returned, in order: the host is free then."""

    @property
    def ops(self) -> Ops:
        """The operations the model is built over."""

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool of `num_blocks` and get the model's step ready to run.
        May be called again: the old pool is dropped."""

    def host_pool(self) -> np.ndarray | None:
        """The pool as uint8 [num_blocks, block_bytes] when it lies in host memory, not copied."""

    def kv_memory(self, staging_bytes: int) -> PoolMemory:
        """The pool for KV transfer: itself where it lies in host memory, else by way of at most
        `staging_bytes` of pinned host memory. Raises ValueError when that is too little."""

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks; pairs [C, 2] int32 of (source, destination), in order."""

    def compute(self, inputs: StepInputs) -> Logits:
        """Run the model on a step."""

    def progress(self) -> float:
        """Changes while `compute` gets on within a step, where that can be seen. Any thread."""

    def sampler(self, batch: SamplingBatch) -> Sampler:
        """Get a step's draws ready, before it is computed."""

    def logprobs(
        self, logits: Logits, rows: np.ndarray, token_ids: np.ndarray, num_top: int
    ) -> Arrays:
        """Log-probabilities of token_ids [L], known or drawn just now, at the rows [L], with the
        `num_top` likeliest: the arrays of `LogprobArrays`."""

    def fetch(self, groups: Sequence[Arrays]) -> Fetched:
        """Bring a step's arrays to the host, behind everything launched so far."""

    def device_bytes(self) -> int:
        """Memory of a GPU that is held here, 0 on a CPU. Any thread."""

    def memory_bytes(self) -> tuple[int, int]:
        """(available, total) memory of the device; on a CPU the total is what is available, as the
        rest is other programs'."""


class CpuBackend:
    """The compiled CPU kernels: the model's step is recorded once and replayed in one call.

    Raises CpuKernelsUnavailable where the library was not built.
    """

    device_type = "cpu"
    is_batch_invariant = True
    returns_early = False

    def __init__(
        self,
        model: ModelConfig,
        dtype: str,
        limits: StepLimits,
        num_threads: int | None,
        group: Group = ALONE,
    ) -> None:
        self.layout = kv_layout(model, dtype, KV_ORDERS[dtype], group)
        self._team = Team(num_threads)
        self.numerics = numerics.cpu_kernels()
        self.ops = CpuOps(self.layout, limits, self._team, group)
        self._sampler = CpuSampler(self._team)
        self._drawn = np.empty(0, np.int32)
        self._program: Program | None = None
        self._pool: np.ndarray | None = None

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Record the model's step over a new pool."""
        self._program = self._pool = None
        self._pool = alloc_pool(self.layout, num_blocks)
        self._program = self.ops.finish(model.forward(self.ops), self._pool)
        self._program.start_profile()  # two looks at the clock per operation buy `progress`

    def host_pool(self) -> np.ndarray:
        """The pool itself. Raises RuntimeError before `allocate`."""
        if self._pool is None:
            raise RuntimeError("allocate comes first")
        return self._pool

    def kv_memory(self, staging_bytes: int) -> PoolMemory:
        """The pool itself."""
        return HostMemory(self.host_pool(), self.layout.block_bytes)

    @property
    def program(self) -> Program:
        """The recorded step. Raises RuntimeError before `allocate`."""
        if self._program is None:
            raise RuntimeError("allocate comes first")
        return self._program

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks."""
        self.program.copy_blocks(pairs)

    def compute(self, inputs: StepInputs) -> np.ndarray:
        """Replay the step."""
        token_ids = with_drawn(inputs.token_ids, self._drawn)
        if token_ids is not inputs.token_ids:
            inputs = replace(inputs, token_ids=token_ids)
        return self.program.run(inputs)

    def progress(self) -> float:
        """Changes with every operation of a step."""
        return self.program.progress()

    def sampler(self, batch: SamplingBatch) -> Sampler:
        """All but the call itself: after the step the caches are the model's."""
        invalid = np.empty(len(batch.rows), np.bool_)
        draw = self._sampler.prepare(self.program.result, batch, invalid)

        def sample(logits: np.ndarray) -> Arrays:
            self._drawn = draw(len(logits))
            return self._drawn, invalid

        return sample

    def logprobs(
        self, logits: np.ndarray, rows: np.ndarray, token_ids: np.ndarray, num_top: int
    ) -> Arrays:
        """Log-probabilities of token_ids [L] at the rows [L]."""
        token_ids = with_drawn(token_ids, self._drawn)
        return self._sampler.logprobs(logits, rows, token_ids, num_top)

    def fetch(self, groups: Sequence[Arrays]) -> Fetched:
        """They are here."""
        return lambda: [list(group) for group in groups]

    def device_bytes(self) -> int:
        """None."""
        return 0

    def memory_bytes(self) -> tuple[int, int]:
        """(available, total) memory of the host."""
        available = available_host_bytes()
        return available, available


class TorchBackend:
    """Eager torch: CUDA, and any machine without the compiled CPU kernels."""

    is_batch_invariant = False

    def __init__(self, model: ModelConfig, dtype: str, device: str, group: Group = ALONE) -> None:
        self.layout = kv_layout(model, dtype, KvOrder.PLAIN, group)
        self.device = torch.device(device)
        self.device_type = self.device.type
        self.numerics = numerics.torch_kernels(self.device)
        self.returns_early = self.device_type == "cuda"
        if self.device_type == "cuda":
            torch.cuda.set_device(self.device)  # kernels and events go where this thread points
        self.ops = TorchOps(self.layout, 1, device, group=group)
        self._model: Llama | None = None

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool."""
        self._model = model
        del self.ops.pool  # before the new one is made
        if self.device_type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        shape = (num_blocks, *self.layout.block_shape)
        self.ops.pool = torch.zeros(shape, dtype=self.ops.dtype, device=self.device)

    def host_pool(self) -> np.ndarray | None:
        """The pool's bytes, on a CPU."""
        if self.device_type != "cpu":
            return None
        pool: np.ndarray = self.ops.pool.flatten(1).view(torch.uint8).numpy()
        return pool

    def kv_memory(self, staging_bytes: int) -> PoolMemory:
        """The pool on a CPU, else places in pinned memory."""
        pool = self.host_pool()
        if pool is not None:
            return HostMemory(pool, self.layout.block_bytes)
        return StagedMemory(PoolCopies(self.ops.pool, staging_bytes))

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks."""
        self.ops.copy_blocks(pairs)

    @torch.inference_mode()
    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """Run the model operation by operation."""
        if self._model is None:
            raise RuntimeError("allocate comes first")
        self.ops.begin(inputs)
        logits: torch.Tensor = self._model.forward(self.ops)
        return logits

    def progress(self) -> float:
        """Nothing can be seen within a step."""
        return 0.0

    def sampler(self, batch: SamplingBatch) -> Sampler:
        """Nothing to get ready."""
        return partial(self._sample, batch)

    @torch.inference_mode()
    def _sample(self, batch: SamplingBatch, logits: torch.Tensor) -> Arrays:
        tokens, invalid = self.ops.kernels.sample(logits, batch)
        self.ops.drawn = tokens
        return tokens, invalid

    @torch.inference_mode()
    def logprobs(
        self, logits: torch.Tensor, rows: np.ndarray, token_ids: np.ndarray, num_top: int
    ) -> Arrays:
        """Log-probabilities of token_ids [L] at the rows [L]."""
        ids = self.ops.known(to_device(token_ids, logits.device), token_ids)
        return torch_sampler.logprobs(logits, rows, ids, num_top)

    def fetch(self, groups: Sequence[Arrays]) -> Fetched:
        """Copies to pinned memory behind the step, and one wait for all of them."""
        wait = fetch([array for group in groups for array in group])

        def fetched() -> list[list[np.ndarray]]:
            arrays = iter(wait())
            return [list(islice(arrays, len(group))) for group in groups]

        return fetched

    def device_bytes(self) -> int:
        """As torch counts it."""
        on_gpu = self.device_type == "cuda"
        return torch.cuda.memory_reserved(self.device) if on_gpu else 0

    def memory_bytes(self) -> tuple[int, int]:
        """(available, total) memory of the device."""
        if self.device_type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
            torch.cuda.empty_cache()
            available, total = torch.cuda.mem_get_info(self.device)
            # what the largest step so far needed for a while, it will need again
            return available - (peak - torch.cuda.memory_reserved(self.device)), total
        available = available_host_bytes()
        return available, available


def kv_layout(model: ModelConfig, dtype: str, order: KvOrder, group: Group) -> KvLayout:
    """The KV blocks of a model on one rank."""
    num_kv_heads = len(heads_of(model.num_kv_heads, Shard(group.rank, group.size)))
    return KvLayout(model.num_layers, num_kv_heads, model.head_dim, dtype, order)
