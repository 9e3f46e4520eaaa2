"""Dispatch of `quire COMMAND ...`. Nothing heavy is imported before the command is known."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import quire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USAGE_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class SubCommand:
    """A sub-command: its module has `run(argv) -> exit code`."""

    module: str
    summary: str


COMMANDS: Mapping[str, SubCommand] = {
    "serve": SubCommand("quire.cli.serve", "serve a model over an OpenAI-compatible HTTP API"),
    "gateway": SubCommand("quire.cli.gateway", "serve the API in front of workers elsewhere"),
    "router": SubCommand("quire.cli.router", "choose workers for the requests of gateways"),
    "worker": SubCommand("quire.cli.worker", "run one engine for gateways elsewhere"),
    "up": SubCommand("quire.cli.up", "keep a fleet of engine replicas running on Ray"),
    "node": SubCommand("quire.cli.node", "make this host, or pod, a node of a Ray cluster"),
    "status": SubCommand("quire.cli.status", "show the pods of a fleet"),
    "scale": SubCommand("quire.cli.scale", "change how many replicas a fleet's pools have"),
    "role": SubCommand("quire.cli.role", "change what a pod of a fleet is for"),
    "control": SubCommand("quire.cli.control", "drain, flip, put to sleep or ask one worker"),
    "chat": SubCommand("quire.cli.chat", "talk to a model on a running server"),
    "complete": SubCommand("quire.cli.complete", "complete one prompt on a running server"),
    "bench": SubCommand("quire.cli.bench", "measure throughput, latency, or a running server"),
    "top": SubCommand("quire.cli.top", "show what workers do, live"),
    "doctor": SubCommand("quire.cli.doctor", "check this machine, workers, and their links"),
    "collect-env": SubCommand("quire.cli.collect_env", "describe this machine for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Raises SystemExit for --help and mistakes."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in ("-V", "--version", "version"):
        print(f"quire {quire.__version__}")
        return 0
    return dispatch("quire", COMMANDS, args)


def dispatch(prog: str, commands: Mapping[str, SubCommand], args: list[str]) -> int:
    """Run the sub-command that the first argument names, with the rest of them."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview(prog, commands), file=sys.stdout if args else sys.stderr)
        return 0 if args else USAGE_ERROR
    name, *rest = args
    command = commands.get(name.replace("_", "-"))
    if command is None:
        from quire.config.values import did_you_mean

        hint = did_you_mean(name, commands) or f"; see {prog} --help"
        print(f"{prog}: error: unknown command {name!r}{hint}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return int(import_module(command.module).run(rest))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has what it wanted
        sys.stderr.close()
        return 0


def overview(prog: str, commands: Mapping[str, SubCommand]) -> str:
    """What --help prints."""
    lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<14} {command.summary}" for name, command in commands.items()]
    lines += ["", f"{prog} COMMAND --help shows a command's options."]
    if prog == "quire":
        lines += ["quire --version shows the version.", "", "Try: quire serve, then quire chat."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
