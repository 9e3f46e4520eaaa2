"""What rounded weights are worth: tokens/s with --quantization int8 and int4 over those without.

    python -m loadtest.quantized MODEL --out loadtest/results/quantized-m

Through `LLM.generate`, so scheduler and sampler are in the figures. Decode: prompts of a few
tokens, the time of one output token taken off. Prefill: one long prompt, one token out. Ratios are
of the same round, in turn; printed are the median and the least and greatest.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.kept import keep, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.llm import LLM

METHODS = ("float", "int8", "int4")
"""The first one is what the others are divided by."""
PROMPT_LEN = 8


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Fresh random prompts."""
    rng = random.Random(f"{count}/{length}/{seed}")
    return [rng.choices(range(10, 5000), k=length) for _ in range(count)]


def seconds(llm: LLM, asked: Sequence[list[int]], output_len: int) -> float:
    """Time to answer all with so many tokens each."""
    from quire.api.sampling import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    began = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in asked], params, use_tqdm=False)
    return time.perf_counter() - began


def decode_rate(llm: LLM, batch: int, output_len: int, seed: int) -> float:
    """Tokens per second after the first of each."""
    asked = prompts(batch, PROMPT_LEN, seed)
    first = seconds(llm, asked, 1)
    return batch * output_len / (seconds(llm, asked, output_len + 1) - first)


def prefill_rate(llm: LLM, length: int, seed: int) -> float:
    """Prompt tokens per second."""
    return length / seconds(llm, prompts(1, length, seed), 1)


def measure(engines: dict[str, LLM], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per workload: rates by method, and ratios of the same round."""
    works = {
        f"decode, batch {batch}": lambda llm, seed, batch=batch: decode_rate(
            llm, batch, options.output_len, seed
        )
        for batch in options.batch_size
    }
    works[f"prefill, {options.input_len} tokens"] = lambda llm, seed: prefill_rate(
        llm, options.input_len, seed
    )
    rows = []
    for name, work in works.items():
        rates: dict[str, list[float]] = {method: [] for method in engines}
        for number in range(options.repeats + 1):
            order = list(engines) if number % 2 else list(engines)[::-1]
            for method in order:
                rate = work(engines[method], number)
                if number:  # the first round warms up
                    rates[method].append(rate)
        rows.append(row_of(name, rates))
        print(line(rows[-1]), flush=True)
    return rows


def row_of(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """A workload's figures."""
    base = rates[METHODS[0]]
    ratios = {
        method: sorted(rate / plain for rate, plain in zip(rates[method], base, strict=True))
        for method in METHODS[1:]
    }
    return {"work": name, "tokens_per_s": rates, "ratios": ratios}


def line(row: dict[str, Any]) -> str:
    """One workload."""
    plain = median(row["tokens_per_s"][METHODS[0]])
    shown = "   ".join(
        f"{method} {median(r):.2f}x ({r[0]:.2f} to {r[-1]:.2f})"
        for method, r in row["ratios"].items()
    )
    return f"{row['work']:<20} {plain:8.1f} tok/s   {shown}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.quantized", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("model", nargs="?", default="demo")
    add("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    add("--output-len", type=int, default=24)
    add("--input-len", type=int, default=512)
    add("--repeats", type=int, default=5)
    add("--out", type=Path, help="write OUT.json and OUT.txt")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """All engines in this process, in turn."""
    options = parse(argv)
    from quire.llm import LLM

    limits = {
        "max_model_len": max(options.input_len, PROMPT_LEN + options.output_len) + 16,
        "max_num_seqs": max(options.batch_size),
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": False,
    }
    engines = {
        method: LLM(options.model, quantization=None if method == METHODS[0] else method, **limits)
        for method in METHODS
    }
    rows = measure(engines, options)
    data = {"settings": settings_of(options), "rows": rows}
    keep(options.out, data, "\n".join(map(line, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
