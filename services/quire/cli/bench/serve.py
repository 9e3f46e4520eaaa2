"""`quire bench serve`: load a running server, from outside, as its clients see it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import DatasetConfig, LoadConfig
from quire.cli.bench.report import details, parse_goodput, summarize, table
from quire.config.flags import Command, UsageError, parse
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.cli.bench.client import Client
    from quire.cli.bench.datasets import Sample

COMMAND = Command(
    prog="quire bench serve",
    summary="Measure what clients of an OpenAI-compatible server see under load.",
    owners=(LoadConfig, DatasetConfig),
)
FAILED = 1
POLL_S = 0.2
SHOWN_ERRORS = 3


class NotReadyError(Exception):
    """The server does not answer as it should; the message says how."""


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
    from quire.cli.bench.client import Client, Endpoint
    from quire.cli.bench.datasets import load_dataset
    from quire.cli.bench.load import LoadRun, arrival_times

    objectives = parse_goodput(load.goodput)
    extra = _extra_body(load)
    samples = load_dataset(dataset)
    key = load.api_key or os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(load.url, {"Authorization": f"Bearer {key}"} if key else {})
    path = load.endpoint or ("/v1/chat/completions" if load.is_chat else "/v1/completions")
    async with Client(endpoint, load.request_timeout_sec) as client:
        model = load.model or await _wait_for_model(client, load.ready_check_timeout_sec)
        bodies = [_body(sample, model, load, dataset, extra) for sample in samples]
        for _ in range(load.num_warmups):
            outcome = await client.stream(path, bodies[0])
            if not outcome.ok:
                raise NotReadyError(f"{load.url}{path}: {outcome.error}")
        progress = _Progress(len(bodies), enabled=not load.disable_tqdm)
        with progress:
            times = arrival_times(samples, load, dataset.seed)
            runner = LoadRun(client, path, progress.step)
            measured = await runner.run(bodies, times, load.max_concurrency)
    return {
        "date": datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
        "backend": load.backend,
        "label": load.label,
        "model_id": model,
        "num_prompts": len(bodies),
        "request_rate": load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "dataset_name": dataset.dataset_name,
        "seed": dataset.seed,
        **summarize(measured, objectives),
        **details(measured),
    }


async def _wait_for_model(client: Client, patience_s: float) -> str:
    """The first model the server lists, once it answers. Raises NotReadyError."""
    deadline = time.monotonic() + patience_s
    problem = "no answer"
    while True:
        try:
            status, body = await client.get("/v1/models")
            if status == 200:
                return str(json.loads(body)["data"][0]["id"])
            problem = f"HTTP {status}: {body[:200].decode(errors='replace')}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError):
            raise NotReadyError(
                f"{client.endpoint.url}/v1/models is not a list of models"
            ) from None
        if time.monotonic() > deadline:
            raise NotReadyError(f"{client.endpoint.url} is not ready: {problem}")
        await asyncio.sleep(POLL_S)


def _extra_body(load: LoadConfig) -> dict[str, Any]:
    if load.extra_body is None:
        return {}
    try:
        extra = json.loads(load.extra_body)
    except json.JSONDecodeError as error:
        raise ConfigError(f"extra_body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError("extra_body must be a JSON object")
    return extra


def _body(
    sample: Sample, model: str, load: LoadConfig, dataset: DatasetConfig, extra: dict[str, Any]
) -> bytes:
    fields: dict[str, Any] = {
        "model": model,
        "max_tokens": sample.output_len,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if dataset.ignore_eos:
        fields["ignore_eos"] = True
    if load.is_chat:
        if not isinstance(sample.prompt, str):
            raise ConfigError(f"dataset {dataset.dataset_name} is token ids: use --backend openai")
        fields["messages"] = [{"role": "user", "content": sample.prompt}]
    else:
        fields["prompt"] = sample.prompt
    return json.dumps(fields | extra, separators=(",", ":")).encode()


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
