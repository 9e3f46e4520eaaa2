"""`quire bench throughput`: tokens per second of an engine in this process, offline."""

from __future__ import annotations

import gc
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import DatasetConfig, ResultConfig, ThroughputConfig
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, UsageError, parse
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.cli.bench.datasets import Sample

COMMAND = Command(
    prog="quire bench throughput",
    summary="Measure the tokens per second of an engine in this process.",
    owners=(EngineConfig, DatasetConfig, ThroughputConfig, ResultConfig),
    positional="model",
)


@dataclass(frozen=True)
class Measurement:
    """One engine on one set of requests."""

    name: str
    elapsed_s: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    def figures(self) -> dict[str, Any]:
        """Totals and rates, under vLLM's names."""
        total = self.prompt_tokens + self.output_tokens
        return {
            "elapsed_time": self.elapsed_s,
            "num_requests": self.num_requests,
            "total_num_tokens": total,
            "requests_per_second": self.num_requests / self.elapsed_s,
            "tokens_per_second": total / self.elapsed_s,
            "output_tokens_per_second": self.output_tokens / self.elapsed_s,
        }

    def line(self) -> str:
        """The rates, for a terminal."""
        f = self.figures()
        return (
            f"{self.name}: {f['requests_per_second']:.2f} requests/s, "
            f"{f['tokens_per_second']:.1f} total tokens/s, "
            f"{f['output_tokens_per_second']:.1f} output tokens/s ({self.elapsed_s:.2f} s)"
        )


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    dataset, how = resolved.get(DatasetConfig), resolved.get(ThroughputConfig)
    results = resolved.get(ResultConfig)
    from quire.cli.bench.datasets import load_dataset

    try:
        samples = load_dataset(dataset)
        measured = [measure_quire(resolved.get(EngineConfig), dataset, how, samples, results)]
        if how.backend == "transformers":
            from quire.cli.bench.hf import measure_transformers

            measured += measure_transformers(resolved.get(EngineConfig), how, samples)
    except (ValueError, OSError) as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    ours = measured[0]
    for m in measured:
        print(m.line())
    for m in measured[1:]:
        ratio = (ours.output_tokens / ours.elapsed_s) / (m.output_tokens / m.elapsed_s)
        print(f"quire / {m.name}: {ratio:.2f}x output tokens/s")
    if results.output_json is not None:
        by_name = {m.name: m.figures() for m in measured}
        text = json.dumps({**ours.figures(), "engines": by_name}, indent=1)
        Path(results.output_json).write_text(text + "\n", encoding="utf-8")
    return 0


def measure_quire(
    engine: EngineConfig,
    dataset: DatasetConfig,
    how: ThroughputConfig,
    samples: Sequence[Sample],
    results: ResultConfig,
) -> Measurement:
    """Our engine on these requests. Raises ValueError when the model cannot be loaded."""
    from quire.api.sampling import SamplingParams
    from quire.llm import LLM

    llm = LLM(**to_mapping(engine))
    prompts: list[Any] = [
        s.prompt if isinstance(s.prompt, str) else {"prompt_token_ids": s.prompt} for s in samples
    ]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=s.output_len, ignore_eos=dataset.ignore_eos,
            detokenize=False,
        )
        for s in samples
    ]  # fmt: skip
    llm.generate(prompts[:2], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    times, outputs = [], []
    for _ in range(how.num_repeats):
        llm.reset_prefix_cache()  # every run starts as the first did
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=not results.disable_tqdm)
        times.append(time.perf_counter() - began)
    measurement = Measurement(
        name="quire",
        elapsed_s=median(times),
        num_requests=len(samples),
        prompt_tokens=sum(len(o.prompt_token_ids or ()) for o in outputs),
        output_tokens=sum(len(c.token_ids) for o in outputs for c in o.outputs),
    )
    del llm
    gc.collect()  # the next engine needs the memory
    if measurement.output_tokens == 0:
        raise ConfigError("the engine generated nothing")
    return measurement
