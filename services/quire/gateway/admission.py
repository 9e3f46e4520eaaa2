"""How many requests may be in progress at once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_AFTER_S = 1.0


class Admission:
    """Counts requests in progress, and turns away those over the limit before any work on them."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self.open = 0
        """Requests in progress."""

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A place for one request. Raises ApiError overloaded when there is none."""
        if self.open >= self._max_open:
            message = "The server is overloaded. Please retry."
            raise ApiError("overloaded", message, retry_after_s=RETRY_AFTER_S)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
