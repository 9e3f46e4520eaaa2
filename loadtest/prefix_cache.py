"""What prefix caching is worth: throughput with it over throughput without, by the shared part.

    python -m loadtest.prefix_cache MODEL --input-len 2048 --output-len 128 --num-prompts 16

Prompts of one length whose first 0, 25, 50 or 75 % one request has brought before; the published
ratios are 0.99, 1.23, 1.70 and 2.89 (8 B on an H100, 2048 in, 128 out). With prefill a part f of
the time, hits on a part h of the prompt can give 1 / (1 - f h): it depends on the machine, so f is
measured in the same run and the bound printed beside the ratio.
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

BLOCK = 16


def prompts(shared: float, number: int, options: argparse.Namespace) -> list[list[int]]:
    """Fresh prompts with a fresh shared part, in whole blocks."""
    rng = random.Random(f"{options.seed}/{shared}/{number}")
    ids = range(10, options.vocab_size)
    length = int(options.input_len * shared) // BLOCK * BLOCK
    prefix = rng.choices(ids, k=length)
    own = options.input_len - length
    return [prefix + rng.choices(ids, k=own) for _ in range(options.num_prompts)]


def timed(llm: LLM, asked: Sequence[list[int]], output_len: int) -> float:
    """Seconds to answer all, the shared part having been seen."""
    from quire.api.sampling import SamplingParams

    llm.generate({"prompt_token_ids": asked[0]}, SamplingParams(max_tokens=1), use_tqdm=False)
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    began = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in asked[1:]], params, use_tqdm=False)
    return time.perf_counter() - began


def measure(engines: dict[str, LLM], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shared part: times by engine, alternately, and ratios of the same round."""
    rows = []
    for shared in options.shared:
        times: dict[str, list[float]] = {name: [] for name in engines}
        prefills: list[float] = []
        for number in range(options.repeats + 1):
            asked = prompts(shared, number, options)
            order = list(engines) if number % 2 else list(engines)[::-1]
            for name in order:
                took = timed(engines[name], asked, options.output_len)
                if number:  # the first round warms up
                    times[name].append(took)
            if number:
                alone = timed(engines["off"], prompts(shared, -number, options), 1)
                prefills.append(alone / times["off"][-1])
        ratios = [off / on for on, off in zip(times["on"], times["off"], strict=True)]
        part = int(options.input_len * shared) // BLOCK * BLOCK / options.input_len
        bound = 1 / (1 - min(median(prefills), 1.0) * part)
        rows.append(
            {
                "shared": shared,
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "bound": bound,
                "prefill_share": median(prefills),
                "seconds": times,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One shared part."""
    return (
        f"shared {row['shared']:4.0%}: {row['ratio']:.2f}x "
        f"({row['low']:.2f} to {row['high']:.2f}); bound {row['bound']:.2f}x, "
        f"prefill is {row['prefill_share']:.0%} of the time without the cache"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.prefix_cache", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("model", nargs="?", default="demo")
    add("--input-len", type=int, default=1024)
    add("--output-len", type=int, default=64)
    add("--num-prompts", type=int, default=17, help="the first one brings the shared part")
    add("--shared", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    add("--repeats", type=int, default=5)
    add("--vocab-size", type=int, default=5000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="write OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Two engines in this process, one with the cache and one without, in turn."""
    options = parse(argv)
    from quire.llm import LLM

    limits = {"max_model_len": options.input_len + options.output_len, "memory_utilization": 0.2}
    engines = {
        "on": LLM(options.model, enable_prefix_caching=True, **limits),
        "off": LLM(options.model, enable_prefix_caching=False, **limits),
    }
    rows = measure(engines, options)
    if options.out is not None:
        from loadtest.plots import plot_ratios

        data = {"settings": settings_of(options), "rows": rows}
        keep(options.out, data, "\n".join(map(line, rows)))
        bars = [{"label": f"{row['shared']:.0%} shared", **row} for row in rows]
        title = "Throughput with prefix caching over without"
        plot_ratios(bars, options.out.with_suffix(".png"), title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
