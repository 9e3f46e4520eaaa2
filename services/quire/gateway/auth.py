"""API keys: every path needs one, except those named here; commands to workers need another."""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.gateway.cache_salt import tenant_salt
from quire.gateway.scope import header, path_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

PUBLIC = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping", "/version"})
"""Paths that answer without a key: probes have none."""
ADMIN = frozenset({"/sleep", "/wake_up", "/is_sleeping"})
"""Paths that need the admin key instead."""
KEY_VARIABLES = ("QUIRE_API_KEY", "VLLM_API_KEY")


def api_keys(
    configured: Iterable[str], environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The configured keys and those of the environment, without repeats."""
    given = (environment.get(name, "") for name in KEY_VARIABLES)
    return tuple(dict.fromkeys([*configured, *(key for key in given if key)]))


class Authentication:
    """Lets requests through that carry one of the keys as a bearer token.

    Keys are compared as digests, all of them, in constant time. A key is a tenant: its digest
    salts the prefix cache, so that no tenant can find out what another has asked.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError invalid_api_key."""
        # the path of the request line: one made from the Host header has let requests through
        # elsewhere
        if scope["type"] == "http" and self._digests and path_of(scope) not in PUBLIC | ADMIN:
            digest = _authenticate(scope, self._digests)
            scope.setdefault("state", {})["tenant"] = tenant_salt(digest)
        await self._app(scope, receive, send)


def check_admin(scope: Scope, key: str | None) -> None:
    """Raises ApiError unless the request carries the admin key, or when there is none."""
    if key is None:
        message = f"{path_of(scope)} needs an admin key, and this server was started without one."
        raise ApiError("permission_denied", message)
    _authenticate(scope, [_digest(key)])


def _authenticate(scope: Scope, known: list[bytes]) -> bytes:
    """Digest of the request's key. Raises ApiError invalid_api_key when it is not known."""
    values = [v for k, v in scope["headers"] if k == b"authorization"]
    if not values:
        message = "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
        raise ApiError("invalid_api_key", message)
    scheme, _, token = header(scope, b"authorization").partition(" ")
    digest = _digest(token.strip())
    matches = [secrets.compare_digest(digest, each) for each in known]
    if len(values) > 1 or scheme.lower() != "bearer" or not any(matches):
        raise ApiError("invalid_api_key", "Incorrect API key provided.")
    return digest


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
