"""`quire bench ...`, with the options and result names of `vllm bench` where it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.cli.main import SubCommand, dispatch

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "throughput": SubCommand("quire.cli.bench.throughput", "tokens per second of an engine here"),
    "latency": SubCommand("quire.cli.bench.latency", "time of one batch, repeated"),
    "step": SubCommand("quire.cli.bench.step", "time of a step in the model and around it"),
    "startup": SubCommand("quire.cli.bench.startup", "time from a command line to a first token"),
    "serve": SubCommand("quire.cli.bench.serve", "load a running server, measure what clients see"),
}


def run(argv: Sequence[str]) -> int:
    """Run a benchmark; returns the exit code."""
    return dispatch("quire bench", COMMANDS, list(argv))
