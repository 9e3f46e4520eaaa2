"""The CUDA backend: torch and Triton kernels, decode steps replayed as CUDA graphs.

Life of a decode step: its arrays go to the device in one transfer from pinned memory, the graph of
the next batch size is replayed, tokens are drawn on the device and come back in one transfer. Steps
with chunks of prompts run operation by operation, as all steps do under `--enforce-eager`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.engine.runner.backend import TorchBackend
from quire.engine.runner.graphs import CudaCapture, DecodeGraphs, is_decode
from quire.kernels.group import ALONE

if TYPE_CHECKING:
    from quire.engine.models.config import ModelConfig
    from quire.engine.models.llama import Llama
    from quire.engine.runner.backend import StepLimits
    from quire.engine.runner.graphs import Capture
    from quire.kernels.group import Group
    from quire.kernels.ops import StepInputs

SCRATCH_BLOCKS = 1
"""Blocks of the pool beyond those of the scheduler: what padded rows write goes there."""


class CudaBackend(TorchBackend):
    """`TorchBackend` with graphs for decode."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: str,
        device: str,
        limits: StepLimits,
        group: Group = ALONE,
    ) -> None:
        super().__init__(model, dtype, device, group)
        self.limits = limits
        self.graphs: DecodeGraphs | None = None

    def allocate(self, model: Llama, num_blocks: int) -> None:
        """Give the backend a zeroed pool and capture the decode steps over it."""
        self.graphs = None  # they hold the old pool
        super().allocate(model, num_blocks + SCRATCH_BLOCKS)
        with torch.inference_mode():
            self.graphs = DecodeGraphs(model, self.ops, self.limits, self.capture())

    def capture(self) -> Capture:
        """How steps are recorded."""
        return CudaCapture(self.device)

    @torch.inference_mode()
    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """Replay a decode step; run any other operation by operation."""
        if self.graphs is not None and is_decode(inputs):
            return self.graphs.run(inputs)
        return super().compute(inputs)
