"""The scheduler's bounds and totals, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step and of the scheduler's memory."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_logit_rows: int
    """Rows of a step whose logits may be asked for; at least max_num_seqs."""
    vocab_size: int
    watermark_blocks: int = 0
    """Blocks that admission leaves available for the running sequences to grow into."""


@dataclass
class SchedulerCounters:
    """Totals since the start."""

    steps: int = 0
    preemptions: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    cache_hits: int = 0
