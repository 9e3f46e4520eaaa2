"""Reading request bodies: bounded, and JSON that no two parsers read differently."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

MAX_DEPTH = 64
BODY_TIMEOUT_S = 30.0


async def read_json(scope: Scope, receive: Receive, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises ApiError: unsupported_media_type, body_too_large, request_timeout, invalid_json,
    invalid_type, invalid_value (a string that is not Unicode).
    """
    _check_content_type(scope)
    body = await read_body(scope, receive, max_bytes)
    value = parse(body)
    if not isinstance(value, dict):
        raise ApiError("invalid_type", "The request body must be a JSON object.")
    return value


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """All of a request's body. Raises ApiError as `read_json`; ConnectionError if cut off."""
    too_large = ApiError("body_too_large", f"The request body is over {max_bytes} bytes.")
    length = _header(scope, b"content-length")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large  # before `100 Continue` is sent, or anything is read
    chunks = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError("the client left before its request was complete")
                chunks += message.get("body", b"")
                if len(chunks) > max_bytes:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        message_text = f"The request body did not arrive within {BODY_TIMEOUT_S:g} seconds."
        raise ApiError("request_timeout", message_text) from None
    return bytes(chunks)


def parse(body: bytes) -> Any:
    """A JSON value. Raises ApiError on anything that is not strictly JSON, or nested too deep."""
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise ApiError("invalid_json", "The request body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        message = (
            f"The request body is not valid JSON: {error.msg} "
            f"(line {error.lineno}, column {error.colno})."
        )
        raise ApiError("invalid_json", message) from None
    except ValueError as error:  # from the hooks, and integers of thousands of digits
        text = str(error) if isinstance(error, _NotStrictError) else "a number is too long"
        raise ApiError("invalid_json", f"The request body is not valid JSON: {text}.") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if b"\\u" in body:
        _check_unicode(value, "")
    return value


class _NotStrictError(ValueError):
    """Legal for Python's parser, not for ours."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _NotStrictError("an object has the same key twice")
    return made


def _no_constant(name: str) -> None:
    raise _NotStrictError(f"{name} is not a JSON number")


def _too_deep() -> ApiError:
    return ApiError("invalid_json", f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        containers = [item for item in level if isinstance(item, dict | list)]
        depth += bool(containers)
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _check_unicode(value: Any, path: str) -> None:
    """Raise ApiError naming the first string with half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            message = f"'{path}' holds half of a surrogate pair, which is not a character."
            raise ApiError("invalid_value", message, path or None) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_unicode(key, path)
            _check_unicode(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_unicode(item, f"{path}[{i}]")


def _check_content_type(scope: Scope) -> None:
    media_type = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    # strictly: a web page of another origin can send the simple types, and none, without asking
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        raise ApiError("unsupported_media_type", "Send the request as application/json.")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
