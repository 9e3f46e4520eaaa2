"""`quire bench serve`: load a running server, from outside, as its clients see it."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import DatasetConfig, LoadConfig
from quire.cli.bench.report import details, parse_goodput, summarize, table
from quire.cli.bench.target import NotReadyError, open_target
from quire.config.flags import Command, UsageError, parse
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    prog="quire bench serve",
    summary="Measure what clients of an OpenAI-compatible server see under load.",
    owners=(LoadConfig, DatasetConfig),
)
FAILED = 1
SHOWN_ERRORS = 3


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    load, dataset = resolved.get(LoadConfig), resolved.get(DatasetConfig)
    import uvloop

    try:
        result = uvloop.run(measure(load, dataset))
    except ConfigError as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    except NotReadyError as error:
        print(f"{COMMAND.prog}: error: {error}", file=sys.stderr)
        return FAILED
    print(table(result))
    for reason in list(dict.fromkeys(e for e in result["errors"] if e))[:SHOWN_ERRORS]:
        print(f"failed: {reason}", file=sys.stderr)
    if load.save_result or load.save_detailed or load.result_filename:
        _save(load, result)
    return FAILED if result["completed"] == 0 else 0


async def measure(load: LoadConfig, dataset: DatasetConfig) -> dict[str, Any]:
    """All figures of a run. Raises ConfigError, NotReadyError."""
    from quire.cli.bench.datasets import load_dataset
    from quire.cli.bench.load import LoadRun, arrival_times

    objectives = parse_goodput(load.goodput)
    samples = load_dataset(dataset)
    async with open_target(load) as target:
        bodies = [target.body(s.prompt, s.output_len, dataset.ignore_eos) for s in samples]
        await target.warm_up(bodies[0], load.num_warmups)
        progress = _Progress(len(bodies), enabled=not load.disable_tqdm)
        with progress:
            times = arrival_times(samples, load, dataset.seed)
            runner = LoadRun(target.client, target.path, progress.step)
            measured = await runner.run(bodies, times, load.max_concurrency)
    return {
        "date": datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
        "backend": load.backend,
        "label": load.label,
        "model_id": target.model,
        "num_prompts": len(bodies),
        "request_rate": load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "dataset_name": dataset.dataset_name,
        "seed": dataset.seed,
        **summarize(measured, objectives),
        **details(measured),
    }


class _Progress:
    """A tqdm bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="req")

    def step(self) -> None:
        """One more is finished."""
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _save(load: LoadConfig, result: dict[str, Any]) -> None:
    shown = dict(result)
    if not load.save_detailed:
        for name in ("input_lens", "output_lens", "ttfts", "itls", "errors"):
            del shown[name]
    model = str(result["model_id"]).rpartition("/")[2]
    name = load.result_filename or (
        f"{load.backend}-{load.request_rate}qps-{model}-{result['date']}.json"
    )
    path = Path(load.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    print(f"results: {path}")
