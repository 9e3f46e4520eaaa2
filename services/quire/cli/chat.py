"""`quire chat`: a conversation with a model on a running server."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.cli.remote import Remote, RemoteConfig, RemoteError, fail, show
from quire.config.base import check_fields
from quire.config.flags import Command, parse
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How the conversation begins."""

    system_prompt: str | None = option(None, "conversation")
    """Instructions that come before the conversation."""
    quick: str | None = option(None, "conversation", aliases=("-q",))
    """Ask this one question, print the answer and exit."""

    def __post_init__(self) -> None:
        check_fields(self)


COMMAND = Command(
    prog="quire chat",
    summary="Talk to a model on a running server.",
    owners=(ChatConfig, RemoteConfig),
    epilog=f"{HELP} Without a terminal, each line of stdin is a message.",
)


def run(argv: Sequence[str]) -> int:
    """Chat until the end of input; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    chat = resolved.get(ChatConfig)
    try:
        with Remote(resolved.get(RemoteConfig)) as remote:
            if chat.quick is not None:
                show(remote.stream_chat([*_opening(chat), _user(chat.quick)]))
            else:
                _converse(remote, chat)
    except RemoteError as error:
        return fail(COMMAND.prog, error)
    return 0


def _converse(remote: Remote, chat: ChatConfig) -> None:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{remote.model}. {HELP}")
    messages = _opening(chat)
    for text in _lines(interactive):
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            messages = _opening(chat)
            continue
        messages.append(_user(text))
        try:
            answer = show(remote.stream_chat(messages))
        except RemoteError as error:
            if not interactive:
                raise
            messages.pop()
            fail(COMMAND.prog, error)
            continue
        messages.append({"role": "assistant", "content": answer})


def _lines(interactive: bool) -> Iterator[str]:
    """Messages, without empty ones, until the end of input."""
    if interactive:
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            text = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops what is typed so far, as shells do
            print()
            continue
        if not interactive and not text:
            return
        if text.strip():
            yield text.strip()


def _opening(chat: ChatConfig) -> list[dict[str, str]]:
    return [] if chat.system_prompt is None else [{"role": "system", "content": chat.system_prompt}]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
