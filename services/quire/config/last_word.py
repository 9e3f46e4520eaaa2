"""Why a process of ours ended, by what it said on its stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "quire: error: "


def last_word(lines: Sequence[str]) -> str:
    """The line that says why, without its prefix; "" where nothing was said.

    It need not be the last one: a library may log what it thinks of the end.
    """
    said = [line for line in lines if PREFIX in line]
    return (said or lines or [""])[-1].strip().removeprefix(PREFIX)
