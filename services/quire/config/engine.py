"""Options of one engine, under vLLM's names where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.base import check_fields
from quire.config.option import option

QUANTIZATIONS = ("int8", "int4", "gptq", "gptq_marlin", "awq", "awq_marlin", "compressed-tensors")
"""vLLM's name for a kernel, *_marlin, says no more of a checkpoint than the format's."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine loads and how it schedules. Validated across fields at construction."""

    model: str = option("demo", "model")
    """Model to serve: a local folder, a Hugging Face id, or "demo" for the embedded model."""
    tokenizer: str | None = option(None, "model")
    """Tokenizer folder or id; the model's own when not given."""
    revision: str | None = option(None, "model")
    """Branch, tag or commit of a Hugging Face model."""
    dtype: str = option("auto", "model", choices=("auto", "float32", "bfloat16", "float16"))
    """Compute type: auto (the checkpoint's), float32, bfloat16 or float16."""
    quantization: str | None = option(None, "model", aliases=("-q",))
    """int8 and int4 round the weights of a checkpoint of floats while it loads, in groups of 128.
    gptq, awq and compressed-tensors name what the checkpoint must be; it is found without."""
    load_format: str = option("auto", "model", choices=("auto", "dummy"))
    """auto reads safetensors; dummy fills random weights (for benchmarks)."""
    device: str = option("auto", "model", choices=("auto", "cpu", "cuda"))
    """auto, cpu or cuda."""
    max_model_len: int | None = option(None, "model")
    """Most tokens of one request, prompt and output together; the model's own limit by default."""
    block_size: int = option(16, "cache")
    """Tokens in a KV block. Fixed at 16; accepted for compatibility."""
    kv_cache_memory_bytes: int | None = option(None, "cache", aliases=("kv_cache_memory",))
    """Bytes for the KV cache of each rank (suffixes K, M, G). Otherwise a profiling run decides."""
    memory_utilization: float | None = option(None, "cache", aliases=("gpu_memory_utilization",))
    """Share of the device's memory the engine may use, when kv_cache_memory_bytes is not given:
    0.9 by default on a GPU, on a CPU 0.5 of what is available after loading."""
    enable_prefix_caching: bool = option(True, "cache")
    """Reuse the KV blocks of prompts that begin alike."""
    max_num_seqs: int = option(64, "scheduler")
    """Most sequences in one step."""
    max_num_batched_tokens: int = option(512, "scheduler")
    """Token budget of one step: running decodes first, then chunks of waiting prompts."""
    max_num_queued_reqs: int = option(1024, "scheduler")
    """Requests that may wait; more are rejected with 503 and Retry-After."""
    max_num_queued_tokens: int = option(2_000_000, "scheduler")
    """Prompt tokens that may wait, over all waiting requests."""
    scheduling_policy: str = option("fcfs", "scheduler", choices=("fcfs", "priority"))
    """fcfs, or priority (lower value first, then arrival)."""
    async_scheduling: bool | None = option(None, "scheduler")
    """Plan the next step while one runs: by default on a GPU, which computes beside the host, and
    not on a CPU. Not possible with tensor parallelism."""
    watermark: float = option(0.01, "cache")
    """Share of KV blocks kept free when admitting, so that running requests are not preempted."""
    tensor_parallel_size: int = option(1, "execution", aliases=("-tp",))
    """Devices that share the model: one process each, and a part of every large weight. Must divide
    the attention heads."""
    seed: int = option(0, "model")
    """Seed of dummy weights. Requests without a seed draw their own."""
    num_threads: int | None = option(None, "execution")
    """CPU threads of the engine, over all its ranks; the CPUs this process may use by default."""
    enforce_eager: bool = option(False, "execution")
    """Run operations one by one instead of replaying a recorded step (debugging)."""
    stall_timeout_s: float = option(60.0, "execution")
    """Seconds without a finished step, work pending, after which the engine counts as failed."""
    drain_timeout_s: float = option(25.0, "execution")
    """Seconds that a worker which was told to end, by SIGTERM or a drain, waits for its requests to
    go elsewhere or to finish."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block_size != 16:
            raise ValueError(f"block_size is fixed at 16, not {self.block_size}")
        if self.quantization not in (None, *QUANTIZATIONS):
            known = ", ".join(QUANTIZATIONS)
            raise ValueError(f"quantization must be one of {known}, not {self.quantization!r}")
        positive = ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens")
        for name in (*positive, "max_num_queued_reqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence needs one token a step"
            )
        if self.async_scheduling and self.tensor_parallel_size > 1:
            raise ValueError(
                "async_scheduling is not possible with tensor_parallel_size > 1: the other ranks "
                "know drawn tokens from the next step's plan only"
            )
        if self.memory_utilization is not None and not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization must be in (0, 1], not {self.memory_utilization}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {self.watermark}")
