"""`quire bench startup`: from `quire serve` on a command line to readiness and a first token."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from quire.cli.bench.client import Client, Endpoint
from quire.cli.bench.options import ResultConfig, StartupConfig
from quire.config.flags import Command, UsageError, parse
from quire.config.last_word import last_word

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    prog="quire bench startup",
    summary="Measure how long `quire serve` takes until it is ready, and until its first token.",
    owners=(StartupConfig, ResultConfig),
    positional="model",
)
POLL_S = 0.02
END_S = 60
FIGURES = ("listening", "ready", "first_token")


class StartupFailed(Exception):
    """The server ended, or took too long; the message says which."""


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    how, results = resolved.get(StartupConfig), resolved.get(ResultConfig)
    try:
        rows = [asyncio.run(measure(how)) for _ in range(how.num_iters)]
    except StartupFailed as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    figures = {name: [row[name] for row in rows] for name in FIGURES}
    for name, values in figures.items():
        shown = f"{median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
        print(f"{name.replace('_', ' '):<12} {shown}")
    if results.output_json is not None:
        Path(results.output_json).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return 0


async def measure(how: StartupConfig) -> dict[str, float]:
    """Seconds from the start of the process to each of FIGURES. Raises StartupFailed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "quire", "serve", how.model, "--port", str(port)]
    command += how.serve_args.split()
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    waiting = asyncio.create_task(_times(f"http://127.0.0.1:{port}", began))
    ending = asyncio.create_task(process.communicate())
    try:
        await asyncio.wait(
            {waiting, ending}, timeout=how.timeout_sec, return_when=asyncio.FIRST_COMPLETED
        )
        if waiting.done():
            return waiting.result()
        if not ending.done():
            raise StartupFailed(f"no token within {how.timeout_sec:g} s")
        said = ending.result()[1].decode(errors="replace").strip().splitlines()
        raise StartupFailed(f"the server ended: {last_word(said) or process.returncode}")
    finally:
        waiting.cancel()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait({ending}, timeout=END_S)


async def _times(url: str, began: float) -> dict[str, float]:
    times: dict[str, float] = {}
    body = json.dumps({"prompt": "def ", "max_tokens": 1, "stream": True}).encode()
    async with Client(Endpoint(url), 60) as client:
        while "ready" not in times:
            try:
                status, _ = await client.get("/readyz")
            except (OSError, TimeoutError):
                await asyncio.sleep(POLL_S)
                continue
            times.setdefault("listening", time.perf_counter() - began)
            if status == 200:
                times["ready"] = time.perf_counter() - began
            else:
                await asyncio.sleep(POLL_S)
        outcome = await client.stream("/v1/completions", body)
        if not outcome.ok:
            raise StartupFailed(outcome.error)
        times["first_token"] = time.perf_counter() - began
    return times
