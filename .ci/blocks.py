"""Code blocks of a Markdown file by role, so that CI and tests run what the documents say.

A fenced block's info string is its language and, after a space, its role:

    bash setup    set-up commands, run by .ci/run in a fresh environment
    bash tests    the test command, run by .ci/run
    bash server   starts a server in the background, stopped when the document's blocks have run
    bash, python  run in order by tests/docs, with a server of the document running
    anything else (text, json, yaml ...) is shown, not run

Usage: python3 .ci/blocks.py FILE ROLE   prints the blocks of that role.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w+)(?: +(\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    role: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a file, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(m[1], m[2] or "run", m[3], text[: m.start()].count("\n") + 1)
        for m in FENCE.finditer(text)
    ]


if __name__ == "__main__":
    for block in blocks(Path(sys.argv[1])):
        if block.role == sys.argv[2]:
            print(block.text, end="")
