"""`python -m loadtest.gpu`: what one GPU reaches, against what its memory bandwidth allows.

Random weights in the shapes of an 8B Llama and a 0.6B Qwen3; nothing is downloaded. Figures are
printed as they come and written to OUT.json and OUT.txt. Under ten minutes on an H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loadtest.gpu.figures import FULL, Figure, Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULTS = Path(__file__).parents[1] / "results"


def measure(sizes: Sizes, folder: Path) -> Iterator[Figure]:
    """Every figure, the bandwidth that others are shares of first. Folders go below `folder`."""
    from loadtest.gpu import engine, kernels

    bytes_per_s = kernels.bandwidth(sizes)
    yield Figure("copy bandwidth, read and written", bytes_per_s / 1e9, "GB/s")
    yield from kernels.attention(sizes, bytes_per_s)
    yield from kernels.matmuls(sizes)
    for model in sizes.models:
        yield from engine.decode(sizes, model, folder, bytes_per_s)
    yield from engine.throughput(sizes, folder)


def run(sizes: Sizes, folder: Path, out: Path) -> None:
    """Measure, print and write."""
    began = time.monotonic()
    figures = []
    for figure in measure(sizes, folder):
        figures.append(figure)
        print(f"{time.monotonic() - began:5.0f} s  {figure.line()}", flush=True)
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else sizes.device
    data = {"device": name, "torch": torch.__version__, "figures": [asdict(f) for f in figures]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = [name, *(f.line() for f in figures)]
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/quire-gpu").expanduser())
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("loadtest.gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    run(FULL, options.cache_dir, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
