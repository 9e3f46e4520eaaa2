"""Options of one engine, under vLLM's names where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine loads and how it schedules. Validated across fields at construction."""

    model: str = "demo"
    """Model to serve: a local folder, a Hugging Face id, or "demo" for the embedded model."""
    tokenizer: str | None = None
    """Tokenizer folder or id; the model's own when not given."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model."""
    dtype: str = "auto"
    """Compute type: auto (the checkpoint's), float32, bfloat16 or float16."""
    load_format: str = "auto"
    """auto reads safetensors; dummy fills random weights (for benchmarks)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    max_model_len: int | None = None
    """Most tokens of one request, prompt and output together; the model's own limit by default."""
    block_size: int = 16
    """Tokens in a KV block. Fixed at 16; accepted for compatibility."""
    kv_cache_memory_bytes: int | None = None
    """Bytes for the KV cache (suffixes K, M, G). Otherwise sized by a profiling run."""
    memory_utilization: float = 0.9
    """Share of the device's memory the engine may use, when kv_cache_memory_bytes is not given."""
    enable_prefix_caching: bool = True
    """Reuse the KV blocks of prompts that begin alike."""
    max_num_seqs: int = 64
    """Most sequences in one step."""
    max_num_batched_tokens: int = 512
    """Token budget of one step: running decodes first, then chunks of waiting prompts."""
    max_num_queued_reqs: int = 1024
    """Requests that may wait; more are rejected with 503 and Retry-After."""
    max_num_queued_tokens: int = 2_000_000
    """Prompt tokens that may wait, over all waiting requests."""
    scheduling_policy: str = "fcfs"
    """fcfs, or priority (lower value first, then arrival)."""
    watermark: float = 0.01
    """Share of KV blocks kept free when admitting, so that running requests are not preempted."""
    seed: int = 0
    """Seed of dummy weights. Requests without a seed draw their own."""
    num_threads: int | None = None
    """CPU threads of the engine; the CPUs this process may use by default."""
    enforce_eager: bool = False
    """Run operations one by one instead of replaying a recorded step (debugging)."""
    stall_timeout_s: float = 60.0
    """Seconds without a finished step, work pending, after which the engine counts as failed."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("load_format", self.load_format, ("auto", "dummy"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        if self.block_size != 16:
            raise ValueError(f"block_size is fixed at 16, not {self.block_size}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence needs one token a step"
            )
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization must be in (0, 1], not {self.memory_utilization}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {self.watermark}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
