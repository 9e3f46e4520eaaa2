"""The command line of a set of config classes, on argparse."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quire.config.base import field_docs, options_of
from quire.config.resolve import CONFIG_VARIABLE, Sources
from quire.config.values import ConfigError, did_you_mean
from quire.config.vllm import IGNORED, REFUSED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quire.config.base import Option
    from quire.config.resolve import Resolved

USAGE_ERROR = 2
"""Exit code for a command line, file or environment that cannot be used."""


@dataclass(frozen=True)
class Command:
    """What a command accepts, beside its name."""

    prog: str
    summary: str
    owners: tuple[type[Any], ...]
    positional: str | None = None
    """Field that may be given without its flag."""
    reads_environment: bool = False
    """Also takes values from --config and QUIRE_* variables."""
    known_variables: tuple[str, ...] = ()
    """QUIRE_* variables of other commands, which are no mistake here."""
    epilog: str = ""


class UsageError(SystemExit):
    """Ends the process with exit code 2; one line on stderr has said why."""

    def __init__(self, prog: str, message: str) -> None:
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
        super().__init__(USAGE_ERROR)


def parse(command: Command, argv: Sequence[str], environ: Mapping[str, str]) -> Resolved:
    """The configs of a command. Prints and exits for --help, --dump-config and mistakes.

    Warnings go to stderr, one line each.
    """
    parser = _build(command)
    namespace, rest = parser.parse_known_args(_with_dashes(argv))
    if rest:
        _refuse(parser, command, rest)
    sources = Sources(command.owners)
    try:
        if command.reads_environment:
            path = namespace.config or environ.get(CONFIG_VARIABLE)
            if path:
                sources.add_file(Path(path))
            sources.add_environment(environ, command.known_variables)
        for flag, target, values in namespace.given:
            if isinstance(target, str):
                sources.add_foreign(target, flag, values[0] if values else True)
            else:
                sources.add_flag(target, flag, values)
        resolved = sources.resolve()
    except ConfigError as error:
        raise UsageError(command.prog, str(error)) from None
    if command.reads_environment and namespace.dump_config:
        sys.stdout.write(resolved.dump())
        raise SystemExit(0)
    for warning in resolved.warnings:
        print(f"{command.prog}: warning: {warning}", file=sys.stderr)
    return resolved


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(self.prog, f"{message}; see {self.prog} --help")


class _Record(argparse.Action):
    """Appends (flag as written, option or vLLM name, texts) to `namespace.given`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        texts = [values] if isinstance(values, str) else list(values or ())
        target: Option | str = self.const
        if not isinstance(target, str) and target.kind is bool:
            texts = ["false" if (option_string or "").startswith("--no-") else "true"]
        flag = option_string or (self.metavar if isinstance(self.metavar, str) else "argument")
        namespace.given.append((flag, target, texts))


def _build(command: Command) -> argparse.ArgumentParser:
    positional = f" [{command.positional.upper()}]" if command.positional else ""
    parser = _Parser(
        prog=command.prog,
        usage=f"{command.prog}{positional} [options]",
        description=command.summary,
        epilog=command.epilog,
        formatter_class=_formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.set_defaults(given=[], config=None)
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    if command.reads_environment:
        general.add_argument(
            "--config", metavar="FILE",
            help="YAML file of options: keys are flag names. Overridden by QUIRE_* environment "
            "variables (--max-model-len is QUIRE_MAX_MODEL_LEN), and those by flags.",
        )  # fmt: skip
        general.add_argument(
            "--dump-config", action="store_true",
            help="Print the effective configuration with the source of each value, and exit.",
        )  # fmt: skip
    for owner in command.owners:
        _add_options(parser, owner, command.positional)
    if command.reads_environment:
        for name, foreign in (IGNORED | REFUSED).items():
            _add_foreign(parser, name, takes_value=foreign.takes_value)
    return parser


def _add_options(parser: argparse.ArgumentParser, owner: type[Any], positional: str | None) -> None:
    docs = field_docs(owner)
    groups = {group.title: group for group in parser._action_groups}
    for o in options_of(owner):
        if o.flags[0] in parser._option_string_actions:
            continue  # two configs share the option: both get its value
        title = o.spelling.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if o.name == positional:
            parser.add_argument(
                o.name, action=_Record, const=o, nargs="*" if o.many else "?",
                metavar=o.name.upper(),
                default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip
        shown, hidden = _spellings(o)
        for flags, text in ((shown, _help(o, docs.get(o.name, ""))), (hidden, argparse.SUPPRESS)):
            if flags:
                groups[title].add_argument(
                    *flags, action=_Record, const=o, dest=f"_{o.name}", metavar=_metavar(o),
                    nargs=0 if o.kind is bool else "+" if o.many else None, help=text,
                    default=argparse.SUPPRESS,
                )  # fmt: skip


def _spellings(o: Option) -> tuple[list[str], list[str]]:
    """Flags that --help shows, and others that work. What is off by default is not shown off."""
    if o.kind is not bool:
        return list(o.flags), []
    negated = [f"--no-{flag[2:]}" for flag in o.flags if flag.startswith("--")]
    if o.default is not False:
        return [o.flags[0], negated[0]], [*o.flags[1:], *negated[1:]]
    return [o.flags[0]], [*o.flags[1:], *negated]


def _add_foreign(parser: argparse.ArgumentParser, name: str, *, takes_value: bool) -> None:
    flag = "--" + name.replace("_", "-")
    flags = [flag] if takes_value else [flag, f"--no-{flag[2:]}"]
    parser.add_argument(
        *flags, action=_Record, const=name, dest=f"_{name}", default=argparse.SUPPRESS,
        nargs=None if takes_value else 0, help=argparse.SUPPRESS,
    )  # fmt: skip


def _metavar(o: Option) -> str | None:
    if o.kind is bool:
        return None
    if o.spelling.choices:
        return "{" + ",".join(o.spelling.choices) + "}"
    last = o.name.rpartition("_")[2]
    named = {"bytes": "SIZE", "len": "TOKENS", "tokens": "TOKENS"}
    if o.kind is not str:
        return named.get(last, "N" if o.kind is int else "X")
    return "TEXT" if last in ("prefix", "role") else last.upper()


def _help(o: Option, doc: str) -> str:
    text = doc.replace("%", "%%")
    if o.default is None or o.default in ("", (), False):
        return text
    return f"{text} [{'on' if o.default is True else o.default}]"


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=100)


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Flag names with underscores get dashes; values and everything after `--` stay."""
    out: list[str] = []
    for i, arg in enumerate(argv):
        if arg == "--":
            return [*out, *argv[i:]]
        name, equals, value = arg.partition("=")
        out.append(name.replace("_", "-") + equals + value if name.startswith("--") else arg)
    return out


def _refuse(parser: argparse.ArgumentParser, command: Command, rest: list[str]) -> NoReturn:
    flag = next((arg.partition("=")[0] for arg in rest if arg.startswith("-")), None)
    if flag is None:
        raise UsageError(command.prog, f"unexpected argument {rest[0]!r}")
    hint = did_you_mean(flag, parser._option_string_actions)
    raise UsageError(command.prog, f"unknown option {flag}{hint or f'; see {command.prog} --help'}")
