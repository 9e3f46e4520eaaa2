"""From a model name to a runner that is ready: files, weights, KV cache size, warm-up."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.llama import Llama, weight_shapes
from quire.engine.models.source import CHECKPOINT_FILES, fingerprint
from quire.engine.models.weights import DummyWeights, SafetensorsWeights
from quire.engine.request import BLOCK_SIZE
from quire.engine.runner import memory
from quire.engine.runner.backend import Backend, CpuBackend, StepLimits, TorchBackend
from quire.engine.runner.runner import ModelRunner, largest_step
from quire.kernels.cpu import CpuKernelsUnavailable
from quire.text.folder import locate

if TYPE_CHECKING:
    from pathlib import Path

    from quire.config.engine import EngineConfig

logger = logging.getLogger(__name__)

SPARE_LOGIT_ROWS = 64
"""Logit rows of a step beyond one per seat: for prompt log-probabilities."""
DEFAULT_UTILIZATION = {"cuda": 0.9, "cpu": 0.5}
"""Share of the device's memory; on a CPU, of the memory that is available after loading."""
CPU_REQUESTS_PER_SEAT = 2
"""On a CPU the cache is not sized beyond this many full-length requests per seat."""


@dataclass(frozen=True)
class Startup:
    """Where loading stands: `done` of `total` in `unit` (total 0 when unknown)."""

    phase: str
    detail: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""


class Report(Protocol):
    """Told how loading goes."""

    def __call__(self, startup: Startup) -> None:
        """Called from the loading thread, possibly often."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to step, and the facts that requests are checked against."""

    config: ModelConfig
    runner: ModelRunner
    folder: Path
    fingerprint: bytes
    max_model_len: int
    dtype: str
    device: str


def load_model(config: EngineConfig, report: Report) -> LoadedModel:
    """Load the model that `config` names.

    Raises ValueError (and its kinds ModelNotFound, UnsupportedModel, KvCacheTooSmall) with one
    line that says what to change.
    """
    report(Startup("resolve", config.model))
    folder = locate(config.model, config.revision, CHECKPOINT_FILES)
    model_config = read_config(folder)
    dtype = _dtype(config, model_config)
    device = _device(config)
    max_model_len = _max_model_len(config, model_config)
    limits = _limits(config, max_model_len)
    backend = _backend(config, model_config, dtype, device, limits)
    start = time.monotonic()
    model = _load_weights(config, model_config, folder, backend, report)
    logger.info("loaded %s as %s in %.1f s", config.model, dtype, time.monotonic() - start)
    budget = _budget(config, backend, model, limits, report)
    num_blocks = memory.num_blocks(budget, backend.layout.block_bytes, max_model_len)
    report(Startup("warm_up", f"{num_blocks} KV blocks"))
    backend.allocate(model, num_blocks)
    _warm_up(backend, limits, num_blocks)
    return LoadedModel(
        config=model_config,
        runner=ModelRunner(backend, limits, num_blocks),
        folder=folder,
        fingerprint=fingerprint(folder, dtype),
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
    )


def _dtype(config: EngineConfig, model: ModelConfig) -> str:
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"the checkpoint's dtype {dtype!r} is not supported: give --dtype")
    return dtype


def _device(config: EngineConfig) -> str:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda was asked for, but torch finds no CUDA device")
    return ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ValueError(
            f"max_model_len={config.max_model_len} is beyond the model's {model.max_position} "
            "positions (max_position_embeddings)"
        )
    return config.max_model_len


def _limits(config: EngineConfig, max_model_len: int) -> StepLimits:
    return StepLimits(
        max_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_blocks_per_seq=-(-max_model_len // BLOCK_SIZE),
        max_logit_rows=config.max_num_seqs + SPARE_LOGIT_ROWS,
    )


def _backend(
    config: EngineConfig, model: ModelConfig, dtype: str, device: str, limits: StepLimits
) -> Backend:
    """The compiled kernels on a CPU, unless they are missing or single operations are asked for."""
    if device == "cpu" and not config.enforce_eager:
        try:
            return CpuBackend(model, dtype, limits, config.num_threads)
        except CpuKernelsUnavailable as error:
            logger.warning("%s: computing with torch, slower and not batch-invariant", error)
    if device == "cpu" and config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return TorchBackend(model, dtype, device)


def _load_weights(
    config: EngineConfig, model: ModelConfig, folder: Path, backend: Backend, report: Report
) -> Llama:
    # whole blocks: warm-up fills the last one
    positions = -(-_max_model_len(config, model) // BLOCK_SIZE) * BLOCK_SIZE
    if config.load_format == "dummy":
        report(Startup("load", "random weights"))
        dtype: torch.dtype = getattr(torch, backend.layout.dtype)
        dummy = DummyWeights(weight_shapes(model), dtype, config.seed)
        return Llama(model, backend.ops, dummy, positions)

    def progress(done: int, total: int) -> None:
        report(Startup("load", "weights", done, total, "bytes"))

    with SafetensorsWeights(folder, progress) as weights:
        llama = Llama(model, backend.ops, weights, positions)
        weights.finish()
    return llama


def _budget(
    config: EngineConfig, backend: Backend, model: Llama, limits: StepLimits, report: Report
) -> memory.KvBudget:
    """Bytes for the KV cache: as configured, or what a profiling run of the largest step leaves."""
    if config.kv_cache_memory_bytes is not None:
        return memory.KvBudget(config.kv_cache_memory_bytes, "--kv-cache-memory-bytes")
    report(Startup("profile", "largest step"))
    blocks = max(-(-limits.max_tokens // BLOCK_SIZE), 1)
    backend.allocate(model, blocks)
    _warm_up(backend, limits, blocks)
    # What the step needed is still held, so it is not counted as available.
    available, total = backend.memory_bytes()
    share = config.memory_utilization or DEFAULT_UTILIZATION[backend.device_type]
    budget = max(int(total * share) - (total - available), 0)
    source = f"{share:.0%} of {total / memory.GIB:.2f} GiB, less what is in use"
    if backend.device_type == "cpu":
        per_seat = limits.max_blocks_per_seq * backend.layout.block_bytes
        budget = min(budget, CPU_REQUESTS_PER_SEAT * limits.max_seqs * per_seat)
    return memory.KvBudget(budget, source)


def _warm_up(backend: Backend, limits: StepLimits, num_blocks: int) -> None:
    """Run the largest step and a single-token one: every lazily built thing exists afterwards."""
    step = largest_step(limits, num_blocks)
    backend.compute(step)
    one = np.zeros(1, np.int32)
    single = replace(
        step,
        token_ids=one,
        positions=one,
        query_start=np.array([0, 1], np.int32),
        context_lens=np.ones(1, np.int32),
        block_tables=step.block_tables[:1],
        logit_rows=one,
    )
    backend.compute(single)
