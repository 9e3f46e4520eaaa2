"""What of a prompt's time to first token is KV transfer that its prefill did not hide?

    python -m loadtest.exposed_transfer MODEL --prompt-lens 512 2048 8000

For each transport a server with one prefill and one decode worker. Prompts go one at a time, so
that nothing waits; the figures are of the requests' own traces (`GET /v1/requests/{id}/trace`),
whose parts sum to the time to first token. Exposed are `transfer`, from the end of the prefill to
the last block's arrival, and `commit`, until the decode worker owns them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.compare.rounds import alternate
from loadtest.kept import keep, settings_of
from loadtest.servers import QuireServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.compare.rounds import Series

TRANSPORTS = ("tcp", "grpc", "nixl")
EXPOSED = ("transfer", "commit")
PATIENCE_S = 300
ATTEMPTS = 20
RETRY_S = 0.25
ASKING = ("prefill_ask", "prefill_queue")
"""What else a remote prefill costs: asking for it, and its queue, which is empty here."""


def trace_of(server: QuireServer, draw: Callable[[], list[int]]) -> dict[str, Any]:
    """The trace of one new prompt that another worker prefilled. Raises RuntimeError.

    Asks again for a while: workers that were stopped have to find each other first.
    """
    body: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True, "temperature": 0}
    for _ in range(ATTEMPTS):
        body["prompt"] = draw()
        answer = _json(f"{server.url}/v1/completions", json.dumps(body).encode())
        trace: dict[str, Any] = _json(f"{server.url}/v1/requests/{answer['id']}/trace")
        if "transfer" in trace["prompts"][0]:
            return trace
        time.sleep(RETRY_S)
    raise RuntimeError(f"{server.name}: no prompt was prefilled elsewhere")


def shares_of(trace: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first token, and as shares of it: exposed transfer, asking, prefill."""
    ttft, parts = trace["ttft_s"], {part["name"]: part["seconds"] for part in trace["parts"]}
    return {
        "ttft_s": ttft,
        "exposed_ms": 1e3 * sum(parts[name] for name in EXPOSED),
        "exposed": sum(parts[name] for name in EXPOSED) / ttft,
        "asking": sum(parts[name] for name in ASKING) / ttft,
        "prefill": parts["prefill"] / ttft,
    }


def measured(length: int, options: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """One round: medians over prompts of `length` tokens, new ones each time."""

    def run(server: QuireServer, number: int) -> dict[str, float]:
        rng = random.Random(f"{options.seed}/{length}/{server.name}/{number}")
        draw = partial(rng.choices, range(10, options.vocab_size), k=length)
        rows = [shares_of(trace_of(server, draw)) for _ in range(options.prompts)]
        return {name: median(row[name] for row in rows) for name in rows[0]}

    return run


def line(length: int, name: str, figures: dict[str, dict[str, Series]]) -> str:
    """One prompt length over one transport."""
    each = {figure: by_name[name].summary() for figure, by_name in figures.items()}
    exposed = each["exposed"]
    return (
        f"{length:>6} tokens, {name:<5} TTFT {1e3 * each['ttft_s']['median']:8.1f} ms, "
        f"exposed transfer {each['exposed_ms']['median']:5.1f} ms = {exposed['median']:5.2%} "
        f"({exposed['min']:.2%} to {exposed['max']:.2%}), asking {each['asking']['median']:5.2%}, "
        f"prefill {each['prefill']['median']:6.2%}"
    )


def _json(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return json.load(reply)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.exposed_transfer", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("model", nargs="?", default="demo")
    add("--prompt-lens", type=int, nargs="+", default=[512, 2048, 8000])
    add("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    add("--prompts", type=int, default=3, help="in each round")
    add("--repeats", type=int, default=5)
    add("--max-model-len", type=int, default=8192)
    add("--vocab-size", type=int, default=5000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="write OUT.json and OUT.txt")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parse(argv)
    flags = ["--prefill", "1", "--decode", "1", "--max-model-len", str(options.max_model_len)]
    flags += ["--routing-policy", "least_load"]  # cost lets an idle decode worker prefill
    servers: list[QuireServer] = []
    lines: list[str] = []
    rows = []
    try:
        for transport in options.transports:
            server = QuireServer(transport, options.model, [*flags, "--kv-transports", transport])
            servers.append(server)
            server.wait_ready()
            server.group.freeze()
        for length in options.prompt_lens:
            figures = alternate(servers, options.repeats, measured(length, options))
            for name in options.transports:
                lines.append(line(length, name, figures))
                print(lines[-1], flush=True)
                summary = {figure: each[name].summary() for figure, each in figures.items()}
                rows.append({"prompt_len": length, "transport": name, **summary})
    finally:
        for server in servers:
            server.close()
    keep(options.out, {"settings": settings_of(options), "rows": rows}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
