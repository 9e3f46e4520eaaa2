"""An engine model from measured steps: what `quire bench step --output-json` wrote.

    steps without a prompt    seconds = step_s + step_s_per_stream * streams
    steps with one            seconds = that + prompt tokens / prefill_tokens_per_s

Least squares over medians by batch size, then a ratio of sums: a few steps that the machine
disturbed change neither.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.router.simulation.pod import EngineModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MIN_PROMPT = 64
"""Shorter chunks cost hardly more than a step without one: they say little about the rate."""


def fit_engine(
    steps: Iterable[Mapping[str, Any]], engine: Mapping[str, Any], block_size: int
) -> EngineModel:
    """The model of an engine that took these steps.

    `block_size` is that of the simulated cache, in tokens. Raises ValueError when the steps cannot
    tell: decodes of one batch size alone, or no prompt of some length.
    """
    steps = list(steps)
    step_s, per_stream = _fit_decode([s for s in steps if not s["prompt_tokens"]])
    prompts = [s for s in steps if s["prompt_tokens"] >= MIN_PROMPT]
    if not prompts:
        raise ValueError(f"no step has a prompt chunk of {MIN_PROMPT} tokens or more")
    by_length: dict[int, list[float]] = {}
    for s in prompts:
        beside = step_s + per_stream * s["decodes"]
        by_length.setdefault(s["prompt_tokens"], []).append(s["seconds"] - beside)
    seconds = sum(max(median(values), 1e-9) for values in by_length.values())
    tokens_held = engine["num_blocks"] * engine["block_size"]
    return EngineModel(
        prefill_tokens_per_s=sum(by_length) / seconds,
        step_s=step_s,
        step_s_per_stream=per_stream,
        chunk_tokens=engine["max_num_batched_tokens"],
        max_seqs=engine["max_num_seqs"],
        block_size=block_size,
        cache_blocks=max(tokens_held // block_size, 1),
        bytes_per_token=engine["block_bytes"] / engine["block_size"],
    )


def _fit_decode(steps: list[Mapping[str, Any]]) -> tuple[float, float]:
    """(seconds of a step, further seconds per stream), neither below 0."""
    by_batch: dict[int, list[float]] = {}
    for s in steps:
        by_batch.setdefault(s["decodes"], []).append(s["seconds"])
    if len(by_batch) < 2:
        raise ValueError("decode steps of two batch sizes or more are needed")
    x = np.array(sorted(by_batch), np.float64)
    y = np.array([median(by_batch[int(batch)]) for batch in x])
    per_stream, step_s = np.polyfit(x, y, 1)
    if per_stream < 0:
        return float(y.mean()), 0.0
    if step_s < 0:
        return 0.0, float((y / x).mean())
    return float(step_s), float(per_stream)
