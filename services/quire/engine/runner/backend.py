"""The two ways a step is computed, behind one small interface.

A backend's life: `ops` packs the weights while the model is built over it; `allocate` gives it the
KV pool and makes the model's step ready to run; then `compute` and `sample`, step after step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from quire.engine.scheduler.plan import LogprobArrays
from quire.kernels import torch_sampler
from quire.kernels.layout import KvLayout, KvOrder

if TYPE_CHECKING:
    from quire.engine.models.llama import Llama
    from quire.kernels.ops import Ops, StepInputs
    from quire.kernels.sampling import SamplingBatch


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """Largest step a backend must be able to run."""

    max_tokens: int
    max_seqs: int
    max_blocks_per_seq: int
    max_logit_rows: int


class Backend(Protocol):
    """What the runner needs of a device."""

    ops: Ops
    layout: KvLayout

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool of `num_blocks` and get the model's step ready to run.
        May be called again: the old pool is dropped."""

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks; pairs [C, 2] int32 of (source, destination), in order."""

    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """Run the model: logits [R, V] float32, valid until the next call."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> np.ndarray:
        """Draw tokens: [N] int32. Raises FloatingPointError when a draw has no finite logit."""

    def available_bytes(self) -> int:
        """Memory of the device not in use by anyone."""

    def peak_bytes(self) -> int:
        """Most memory this process has used on the device so far."""


class TorchBackend:
    """Eager torch: CUDA, and any machine without the compiled CPU kernels."""

    def __init__(self, layout: KvLayout, device: str) -> None:
        from quire.kernels.torch_ops import TorchOps

        self.layout = layout
        self.device = torch.device(device)
        self.ops = TorchOps(layout, 1, device)
        self._model: Llama | None = None

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool."""
        self._model = model
        shape = (num_blocks, *self.layout.block_shape)
        del self.ops.pool
        self.ops.pool = torch.zeros(shape, dtype=self.ops.dtype, device=self.device)

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks."""
        self.ops.copy_blocks(pairs)

    @torch.inference_mode()
    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """Run the model: logits [R, V]."""
        assert self._model is not None
        self.ops.begin(inputs)
        logits: torch.Tensor = self._model.forward(self.ops)
        return logits

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> np.ndarray:
        """Draw tokens: [N] int32."""
        invalid = torch.zeros(len(batch.rows), dtype=torch.bool, device=logits.device)
        tokens = torch_sampler.sample(logits, batch, invalid)
        if bool(invalid.any()):
            raise FloatingPointError("a draw has no finite logit")
        return tokens.cpu().numpy()

    def available_bytes(self) -> int:
        """Memory of the device not in use by anyone."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return available_host_bytes()

    def peak_bytes(self) -> int:
        """Most memory this process has used on the device so far."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_host_bytes()


def gather_logprobs(
    logits: torch.Tensor, rows: np.ndarray, token_ids: np.ndarray, num_top: int
) -> LogprobArrays:
    """Log-probabilities of token_ids [L] at the rows [L] of logits [R, V], as numpy arrays."""
    found = torch_sampler.logprobs(logits, rows, token_ids, num_top)
    return LogprobArrays(*(part.cpu().numpy() for part in found))


def kv_layout(num_layers: int, num_kv_heads: int, head_dim: int, dtype: str) -> KvLayout:
    """The torch path's layout."""
    return KvLayout(num_layers, num_kv_heads, head_dim, dtype, KvOrder.PLAIN)


def available_host_bytes() -> int:
    """Host memory that may still be used: what is free or reclaimable, within the cgroup's limit."""
    free = _meminfo("MemAvailable")
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(limit - usage, 0))
    return free


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def peak_host_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _meminfo(name: str) -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
