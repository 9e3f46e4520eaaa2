"""The two ways a step is computed, behind one small interface.

A backend's life: `ops` packs the weights while the model is built over it; `allocate` gives it the
KV pool and makes the model's step ready to run; then `compute` and `sample`, step after step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from quire.engine.runner.memory import available_host_bytes
from quire.engine.scheduler.plan import LogprobArrays
from quire.kernels import torch_sampler

if TYPE_CHECKING:
    import numpy as np

    from quire.engine.models.llama import Llama
    from quire.kernels.layout import KvLayout
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

    layout: KvLayout
    device_type: str
    """cpu or cuda."""
    is_batch_invariant: bool
    """A row's logits are the same bits whatever shares its step and however its prompt was cut."""

    @property
    def ops(self) -> Ops:
        """The operations the model is built over."""

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool of `num_blocks` and get the model's step ready to run.
        May be called again: the old pool is dropped."""

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks; pairs [C, 2] int32 of (source, destination), in order."""

    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """Run the model: logits [R, V] float32, valid until the next call."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> np.ndarray:
        """Draw tokens: [N] int32. Raises FloatingPointError when a draw has no finite logit."""

    def memory_bytes(self) -> tuple[int, int]:
        """(available, total) memory of the device; on a CPU the total is what is available, as the
        rest is other programs'."""


class TorchBackend:
    """Eager torch: CUDA, and any machine without the compiled CPU kernels."""

    is_batch_invariant = False

    def __init__(self, layout: KvLayout, device: str) -> None:
        from quire.kernels.torch_ops import TorchOps

        self.layout = layout
        self.device = torch.device(device)
        self.device_type = self.device.type
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

    def memory_bytes(self) -> tuple[int, int]:
        """(available, total) memory of the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            available, total = torch.cuda.mem_get_info(self.device)
            return available, total
        return available_host_bytes(), available_host_bytes()


def gather_logprobs(
    logits: torch.Tensor, rows: np.ndarray, token_ids: np.ndarray, num_top: int
) -> LogprobArrays:
    """Log-probabilities of token_ids [L] at the rows [L] of logits [R, V], as numpy arrays."""
    found = torch_sampler.logprobs(logits, rows, token_ids, num_top)
    return LogprobArrays(*(part.cpu().numpy() for part in found))
