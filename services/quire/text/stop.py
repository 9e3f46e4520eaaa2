"""Stop strings: found across token boundaries, never shown before it is known they are not one.

The result is a function of the text alone, however it was cut into tokens and batches: the match
that *ends* first wins, and among those ending together the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was completed."""

    stop: str
    text: str
    """What may still be shown of the text given so far: up to the stop string."""


class StopMatcher:
    """Watches one choice's text. Knuth-Morris-Pratt for each stop string, side by side."""

    __slots__ = ("_failure", "_held", "_matched", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._failure = [_failure_table(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string matched so far
        self._held = ""  # text not shown yet: the longest partial match

    def push(self, text: str) -> str | StopMatch:
        """The text that can be shown now, or the match that `text` completes."""
        if not self._stops:
            return text
        for i, char in enumerate(text):
            complete = self._advance(char)
            if complete:
                shown = self._held + text[: i + 1]
                self._held = ""
                return StopMatch(complete, shown[: len(shown) - len(complete)])
        seen = self._held + text
        keep = max(self._matched)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def skip(self, text: str) -> str:
        """Let `text` through unwatched (before min_tokens), together with what was held."""
        self._matched = [0] * len(self._stops)
        return self.flush() + text

    def flush(self) -> str:
        """The text still held back, at the end of the choice."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str:
        """Feed one character; the longest stop string it completes, or ""."""
        complete = ""
        for i, stop in enumerate(self._stops):
            n = self._matched[i]
            while n and stop[n] != char:
                n = self._failure[i][n - 1]
            if stop[n] == char:
                n += 1
            if n == len(stop):
                if n > len(complete):
                    complete = stop
                n = self._failure[i][n - 1]
            self._matched[i] = n
        return complete


def _failure_table(stop: str) -> list[int]:
    """table[i]: length of the longest proper prefix of `stop` that ends at character i."""
    table = [0] * len(stop)
    n = 0
    for i in range(1, len(stop)):
        while n and stop[n] != stop[i]:
            n = table[n - 1]
        if stop[n] == stop[i]:
            n += 1
        table[i] = n
    return table
