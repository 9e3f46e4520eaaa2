"""From a model name to a runner that is ready: files, weights, KV cache size, warm-up."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from quire.engine.models.fitting import fitting_config
from quire.engine.models.llama import Llama, weight_shapes
from quire.engine.models.source import CHECKPOINT_FILES, fingerprint
from quire.engine.models.weights import DummyWeights, SafetensorsWeights
from quire.engine.request import BLOCK_SIZE
from quire.engine.runner import memory
from quire.engine.runner.backend import Backend, CpuBackend, StepLimits, TorchBackend
from quire.engine.runner.cuda import CudaBackend
from quire.engine.runner.runner import ModelRunner, largest_step
from quire.engine.runner.stream import HostStream
from quire.kernels.cpu import CpuKernelsUnavailable
from quire.kernels.group import ALONE
from quire.text.folder import locate
from quire.transfer.layout import Shard

if TYPE_CHECKING:
    from pathlib import Path

    from quire.config.engine import EngineConfig
    from quire.engine.models.config import ModelConfig
    from quire.engine.parallel.gang import Gang
    from quire.engine.parallel.spread import Spread
    from quire.kernels.group import Group

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
    numerics: str
    """See `quire.kernels.numerics`; of all ranks."""
    async_scheduling: bool
    """The next step is planned while one runs."""
    gang: Gang | None = None
    """The other ranks, when there are any."""


@dataclass(frozen=True)
class Place:
    """A rank's place: its group, and where it is among the ranks on this host."""

    group: Group = ALONE
    local_rank: int = 0
    local_size: int = 1


@dataclass(frozen=True)
class ModelChoice:
    """A checkpoint and how it is to be computed; the same on every rank."""

    options: EngineConfig
    folder: Path
    config: ModelConfig
    dtype: str
    max_model_len: int
    limits: StepLimits

    def fingerprint(self) -> bytes:
        """Of the files, or of the random weights: equal on every host that has the same."""
        dummy_seed = self.options.seed if self.options.load_format == "dummy" else None
        return fingerprint(self.folder, self.dtype, _method(self.config), dummy_seed)


@dataclass(frozen=True)
class LoadedRank:
    """One rank's part of a model, ready to step."""

    runner: ModelRunner
    device: str
    numerics: str
    """Of all ranks."""


def load_model(config: EngineConfig, report: Report, spread: Spread | None = None) -> LoadedModel:
    """Load the model that `config` names; with tensor parallelism, start the other ranks first.
    `spread`: over other hosts than this one too.

    Raises ValueError (and its kinds ModelNotFound, UnsupportedModel, KvCacheTooSmall) with one
    line that says what to change, RankFailed (a RuntimeError) when another rank is lost.
    """
    report(Startup("resolve", config.model))
    choice = find_model(config)
    if config.tensor_parallel_size == 1:
        return loaded_model(choice, load_rank(choice, Place(), report))
    from quire.engine.parallel.gang import Gang
    from quire.engine.parallel.gathering import Plan
    from quire.engine.parallel.runner import ParallelRunner

    size, nodes = config.tensor_parallel_size, spread.nodes if spread is not None else 1
    report(Startup("ranks", f"{size} processes" + (f" on {nodes} hosts" if nodes > 1 else "")))
    gang = Gang.start(Plan(config, choice.folder, choice.fingerprint().hex()), spread)
    try:
        rank = load_rank(choice, Place(gang.join(), 0, size // nodes), report)
        gang.loaded()
    except Exception as error:
        gang.give_up(error)
        raise
    runner = ParallelRunner(rank.runner, gang)
    return replace(loaded_model(choice, replace(rank, runner=runner)), gang=gang)


def loaded_model(choice: ModelChoice, rank: LoadedRank) -> LoadedModel:
    """What the engine is given, with the model's fingerprint, which rank 0 alone needs."""
    return LoadedModel(
        config=choice.config,
        runner=rank.runner,
        folder=choice.folder,
        fingerprint=choice.fingerprint(),
        max_model_len=choice.max_model_len,
        dtype=choice.dtype,
        device=rank.device,
        numerics=rank.numerics,
        async_scheduling=plans_ahead(choice.options, rank.runner.backend),
    )


def plans_ahead(config: EngineConfig, backend: Backend) -> bool:
    """Whether steps are planned while one runs: as asked for, else where the device runs beside the
    host. The ranks of a group have no tokens but those in their plans."""
    if config.tensor_parallel_size > 1:
        return False
    asked = config.async_scheduling
    return backend.returns_early if asked is None else asked


def find_model(config: EngineConfig) -> ModelChoice:
    """Resolve the model's files and check the options against it. Raises ValueError."""
    folder = locate(config.model, config.revision, CHECKPOINT_FILES)
    model = fitting_config(config, folder)
    max_model_len = _max_model_len(config, model)
    limits = _limits(config, max_model_len)
    return ModelChoice(config, folder, model, _dtype(config, model), max_model_len, limits)


def _method(model: ModelConfig) -> str:
    return "none" if model.quantization is None else model.quantization.method


def load_rank(choice: ModelChoice, place: Place, report: Report) -> LoadedRank:
    """Load one rank's part of a model. Every rank of the group does so at the same time.

    Raises ValueError with one line for the user, RuntimeError when another rank is lost.
    """
    device = _device(choice.options, place)
    _check_devices(_everyones(place.group, int(device != "cpu")))
    backend = _backend(choice, place, device)
    start = time.monotonic()
    model = _load_weights(choice, place, backend, report)
    took = time.monotonic() - start
    logger.info("loaded %s as %s in %.1f s", choice.options.model, choice.dtype, took)
    budget = _budget(choice, place, backend, model, report)
    num_blocks = memory.num_blocks(budget, backend.layout.block_bytes, choice.max_model_len)
    num_blocks = int(_everyones(place.group, num_blocks).min())  # what every rank has room for
    report(Startup("warm_up", f"{num_blocks} KV blocks"))
    backend.allocate(model, num_blocks)
    _warm_up(backend, choice.limits, num_blocks)
    in_thread = plans_ahead(choice.options, backend) and not backend.returns_early
    stream = HostStream("steps") if in_thread else None
    runner = ModelRunner(backend, choice.limits, num_blocks, stream)
    return LoadedRank(runner, backend.device_type, _numerics(place.group, backend))


def _everyones(group: Group, value: int) -> np.ndarray:
    """A number of every rank, by rank."""
    values = np.empty(group.size, np.int64)
    group.all_gather(values, np.array([value], np.int64))
    return values


def _numerics(group: Group, backend: Backend) -> str:
    """The backend's on this rank, with a mark where other ranks have others."""
    digest = hashlib.blake2b(backend.numerics.encode(), digest_size=8).digest()
    digests = _everyones(group, int.from_bytes(digest, "little", signed=True))
    if (digests == digests[0]).all():
        return backend.numerics
    mark = hashlib.blake2b(digests.tobytes(), digest_size=4).hexdigest()
    return f"{backend.numerics}/ranks-{mark}"


def _dtype(config: EngineConfig, model: ModelConfig) -> str:
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"the checkpoint's dtype {dtype!r} is not supported: give --dtype")
    return dtype


def _device(config: EngineConfig, place: Place) -> str:
    """The torch name of this rank's device."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda was asked for, but torch finds no CUDA device")
    if config.device == "cpu" or not has_cuda:
        return "cpu"
    if place.local_size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size={place.local_size} needs as many CUDA devices, but torch finds "
            f"{torch.cuda.device_count()}: give a smaller --tensor-parallel-size, or --device cpu"
        )
    return "cuda" if place.local_size == 1 else f"cuda:{place.local_rank}"


def _check_devices(on_gpu: np.ndarray) -> None:
    """Ranks with a GPU and ranks without would wait for each other. Raises ValueError."""
    (without,) = np.nonzero(on_gpu == 0)
    if 0 < len(without) < len(on_gpu):
        raise ValueError(
            f"torch finds no CUDA device for rank {', '.join(map(str, without))} of {len(on_gpu)}, "
            "but for the others: mend the host, or give --device cpu"
        )


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


def _backend(choice: ModelChoice, place: Place, device: str) -> Backend:
    """Recorded steps, unless single operations are asked for or the CPU's kernels are missing."""
    config, model, dtype = choice.options, choice.config, choice.dtype
    if device != "cpu" and not config.enforce_eager:
        return CudaBackend(model, dtype, device, choice.limits, place.group)
    num_threads = _num_threads(config, place)
    if device == "cpu" and not config.enforce_eager:
        try:
            return CpuBackend(model, dtype, choice.limits, num_threads, place.group)
        except CpuKernelsUnavailable as error:
            logger.warning("%s: computing with torch, slower and not batch-invariant", error)
    if device == "cpu" and num_threads is not None:
        torch.set_num_threads(num_threads)
    return TorchBackend(model, dtype, device, place.group)


def _num_threads(config: EngineConfig, place: Place) -> int | None:
    """This rank's share of the threads; None for one per CPU."""
    if config.num_threads is not None:
        return max(1, config.num_threads // place.group.size)
    if place.local_size == 1:
        return None
    return max(1, len(os.sched_getaffinity(0)) // place.local_size)


def _load_weights(choice: ModelChoice, place: Place, backend: Backend, report: Report) -> Llama:
    model, ops = choice.config, backend.ops
    shard = Shard(place.group.rank, place.group.size)
    # whole blocks: warm-up fills the last one
    positions = -(-choice.max_model_len // BLOCK_SIZE) * BLOCK_SIZE
    if choice.options.load_format == "dummy":
        report(Startup("load", "random weights"))
        dtype: torch.dtype = getattr(torch, backend.layout.dtype)
        dummy = DummyWeights(weight_shapes(model), dtype, choice.options.seed)
        return Llama(model, ops, dummy, positions, shard)

    def progress(done: int, total: int) -> None:
        report(Startup("load", "weights", done, total, "bytes"))

    with SafetensorsWeights(choice.folder, progress) as weights:
        llama = Llama(model, ops, weights, positions, shard)
        weights.finish()
    return llama


def _budget(
    choice: ModelChoice, place: Place, backend: Backend, model: Llama, report: Report
) -> memory.KvBudget:
    """Bytes for the KV cache: as configured, or what a profiling run of the largest step leaves."""
    config, limits = choice.options, choice.limits
    if config.kv_cache_memory_bytes is not None:
        return memory.KvBudget(config.kv_cache_memory_bytes, "--kv-cache-memory-bytes")
    report(Startup("profile", "largest step"))
    blocks = max(-(-limits.max_tokens // BLOCK_SIZE), 1)
    backend.allocate(model, blocks)
    _warm_up(backend, limits, blocks)
    # What the step needed is still held, so it is not counted as available.
    available, total = backend.memory_bytes()
    share = config.memory_utilization or DEFAULT_UTILIZATION[backend.device_type]
    if backend.device_type == "cpu":
        share /= place.local_size  # the ranks of this host share its memory
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
