"""Small readings of an ASGI scope."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

MAX_HEADER = 128
"""Characters of a caller's header that are repeated or passed on."""
ABORT_EXTENSION = "quire.abort"
_UNSAFE = re.compile(r"[^\x21-\x7e]")


def header(scope: Scope, name: bytes) -> str:
    """A header's value as text, "" when absent; the first one if there are several."""
    value = next((value for key, value in scope["headers"] if key == name), b"")
    return str(value, "latin-1")


def path_of(scope: Scope) -> str:
    """The path below the root path. From the request line, never from the Host header."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def sanitized(value: str) -> str:
    """A caller's header value that can be echoed and logged."""
    return _UNSAFE.sub("", value)[:MAX_HEADER]


def timeout_of(scope: Scope, default_s: float) -> float:
    """Seconds the request may take: X-Request-Timeout, else the default; 0 for no limit.

    Raises ApiError when the header is not a positive number.
    """
    value = header(scope, b"x-request-timeout")
    if not value:
        return default_s
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        message = "The header X-Request-Timeout must be a positive number of seconds."
        raise ApiError("invalid_value", message)
    return min(seconds, default_s) if default_s else seconds


def tenant_of(scope: Scope) -> bytes:
    """Who asks: the salt of the API key's prefix cache, empty where no keys are needed."""
    salt: bytes = scope["state"].get("tenant", b"")
    return salt


def connection_abort(scope: Scope) -> Callable[[], None]:
    """Closes the client's connection at once, also when it does not read."""
    return scope.get("extensions", {}).get(ABORT_EXTENSION) or _nothing


def _nothing() -> None:
    """A server without the extension: the connection closes when its client does."""
