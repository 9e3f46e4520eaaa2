"""`quire bench latency`: how long one batch of requests takes, again and again."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import LatencyConfig, ResultConfig
from quire.cli.bench.report import percentile
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, UsageError, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    prog="quire bench latency",
    summary="Measure how long a batch takes, from its submission to its last token.",
    owners=(EngineConfig, LatencyConfig, ResultConfig),
    positional="model",
)
PERCENTILES = (10, 25, 50, 75, 90, 99)


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    how, results = resolved.get(LatencyConfig), resolved.get(ResultConfig)
    engine = resolved.get(EngineConfig)
    from quire.llm import LLM

    try:
        llm = LLM(**to_mapping(engine))
        rows = [measure(llm, how, size, engine.seed) for size in how.batch_size]
    except (ValueError, OSError) as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    for row in rows:
        print(line(row, how))
    if results.output_json is not None:
        text = json.dumps(rows[0] if len(rows) == 1 else {"batches": rows}, indent=1)
        Path(results.output_json).write_text(text + "\n", encoding="utf-8")
    return 0


def measure(llm: Any, how: LatencyConfig, batch_size: int, seed: int) -> dict[str, Any]:
    """Latencies of one batch size in seconds, under vLLM's names.

    Every run has prompts of its own: the prefix cache answers none of them.
    """
    from quire.api.sampling import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=how.output_len, ignore_eos=True, detokenize=False
    )
    rng = random.Random(f"{seed}/{batch_size}")
    latencies = []
    for i in range(how.num_iters_warmup + how.num_iters):
        prompts = [
            {"prompt_token_ids": rng.choices(range(10, how.vocab_size), k=how.input_len)}
            for _ in range(batch_size)
        ]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if i >= how.num_iters_warmup:
            latencies.append(time.perf_counter() - began)
    ordered = sorted(latencies)
    return {
        "batch_size": batch_size,
        "avg_latency": fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(p): percentile(ordered, p) for p in PERCENTILES},
    }


def line(row: dict[str, Any], how: LatencyConfig) -> str:
    """One batch size, for a terminal."""
    rate = row["batch_size"] * how.output_len / row["avg_latency"]
    shown = ", ".join(f"p{p} {1e3 * v:.1f}" for p, v in row["percentiles"].items())
    return (
        f"batch {row['batch_size']}: mean {1e3 * row['avg_latency']:.1f} ms, {shown}; "
        f"{rate:.1f} output tokens/s"
    )
