"""`quire serve` beside `vllm serve`: the same requests, as `quire bench serve` makes them."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

from loadtest.compare.environments import PEERS, PeerMissing, environ_of
from loadtest.compare.process import Frozen
from loadtest.compare.workloads import SIZES
from quire.cli.bench.options import DatasetConfig, LoadConfig
from quire.cli.bench.serve import measure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

START_S = 600
FIGURES = (
    "p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms", "p50_tpot_ms", "p99_tpot_ms",
    "p50_e2el_ms", "p99_e2el_ms", "output_throughput",
)  # fmt: skip
SERVERS = ("quire", "vllm", "vllm-eager")


@dataclass(frozen=True)
class HttpLoad:
    """One load: lengths in tokens; a concurrency, or a rate in requests per second."""

    num_prompts: int
    input_len: int = 256
    output_len: int = 64
    max_concurrency: int | None = None
    request_rate: float | None = None

    @property
    def name(self) -> str:
        """For the results."""
        load = f"{self.request_rate:g}/s" if self.request_rate else f"conc {self.max_concurrency}"
        return f"http {load}"


class Server:
    """One engine behind HTTP, in a process group of its own."""

    def __init__(self, name: str, model: Path, dtype: str, cache: Path, threads: int) -> None:
        self.name = name
        peer = PEERS[name]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = ["--port", str(self.port), "--dtype", dtype, "--max-model-len", "2048"]
        options += ["--max-num-seqs", "64"]
        if name == "quire":
            command = [sys.executable, "-m", "quire", "serve", str(model), *options]
        else:
            command = [str(cache / "vllm" / "bin" / "vllm"), "serve", str(model), *options]
            command += ["--host", "127.0.0.1", *(["--enforce-eager"] if peer.flags else [])]
        self.log = cache / f"{name}-serve.log"
        with self.log.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ_of(peer, cache, threads),
                start_new_session=True, text=True,
            )  # fmt: skip
        self.group = Frozen(process)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        """Wait until it answers a request. Raises PeerMissing."""
        deadline = monotonic() + START_S
        body = json.dumps({"prompt": [11, 12], "max_tokens": 2}).encode()
        headers = {"Content-Type": "application/json"}
        while monotonic() < deadline:
            if self.group.process.poll() is not None:
                raise PeerMissing(f"{self.name} ended; see {self.log}")
            request = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=60):
                    return
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise PeerMissing(f"{self.name}: HTTP {error.code}; see {self.log}") from None
            except OSError:
                pass
            sleep(0.5)
        raise PeerMissing(f"{self.name} was not ready in {START_S} s; see {self.log}")

    def close(self) -> None:
        """End it."""
        self.group.end()


def http_measure(load: HttpLoad, shape: str) -> Callable[[Server, int], dict[str, float]]:
    """Latencies and throughput of one run; another seed in each round."""

    def run(server: Server, number: int) -> dict[str, float]:
        dataset = DatasetConfig(
            num_prompts=load.num_prompts,
            random_input_len=load.input_len,
            random_output_len=load.output_len,
            vocab_size=SIZES[shape].vocab_size,
            seed=1000 + number,
        )
        config = LoadConfig(
            base_url=server.url,
            request_rate="inf" if load.request_rate is None else repr(load.request_rate),
            max_concurrency=load.max_concurrency,
            disable_tqdm=True,
        )
        result = asyncio.run(measure(config, dataset))
        if result["failed"]:
            raise PeerMissing(f"{server.name}: {result['failed']} requests failed; {server.log}")
        return {figure: result[figure] for figure in FIGURES}

    return run
