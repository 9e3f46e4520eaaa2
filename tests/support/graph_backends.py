"""The CUDA backend where there is no GPU: interpreted kernels, "graphs" that run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.engine.models.config import read_config
from quire.engine.models.llama import Llama
from quire.engine.models.weights import SafetensorsWeights
from quire.engine.runner.cuda import CudaBackend
from quire.engine.runner.graphs import Rerun
from quire.kernels.ops import StepInputs
from quire.kernels.torch_ops import step_kernels

if TYPE_CHECKING:
    from pathlib import Path

    from quire.engine.models.config import ModelConfig
    from quire.engine.runner.backend import StepLimits
    from quire.engine.runner.graphs import Capture

HAS_GPU = torch.cuda.is_available()


class InterpretedCuda(CudaBackend):
    """Static buffers, buckets and padding as on a GPU; the closures run again at every replay."""

    def __init__(self, model: ModelConfig, dtype: str, limits: StepLimits) -> None:
        super().__init__(model, dtype, "cpu", limits)
        self.ops.kernels = step_kernels(use_triton=True)

    def capture(self) -> Capture:
        return Rerun


def graph_backend(folder: Path, limits: StepLimits, dtype: str = "float32") -> CudaBackend:
    """With real graphs where there is a GPU."""
    config = read_config(folder)
    if HAS_GPU:
        return CudaBackend(config, dtype, "cuda", limits)
    return InterpretedCuda(config, dtype, limits)


def load_llama(folder: Path, backend: CudaBackend) -> Llama:
    """The checkpoint over the backend's operations."""
    with SafetensorsWeights(folder) as weights:
        return Llama(read_config(folder), backend.ops, weights, 512)


def step_of(rows: list[tuple[list[int], int, list[int]]]) -> StepInputs:
    """A step of sequences given as (tokens of the step, position of the first, block table)."""
    counts = [len(tokens) for tokens, _, _ in rows]
    width = max(len(table) for _, _, table in rows)
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return StepInputs(
        token_ids=np.array([t for tokens, _, _ in rows for t in tokens], np.int32),
        positions=np.concatenate(
            [np.arange(first, first + len(tokens)) for tokens, first, _ in rows]
        ).astype(np.int32),
        query_start=query_start,
        context_lens=np.array([first + len(tokens) for tokens, first, _ in rows], np.int32),
        block_tables=np.array(
            [table + [0] * (width - len(table)) for _, _, table in rows], np.int32
        ),
        logit_rows=query_start[1:] - 1,
    )
