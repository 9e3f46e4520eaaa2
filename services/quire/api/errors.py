"""The errors a caller can meet, in one table: code -> HTTP status and OpenAI error type.

Codes are OpenAI's strings where OpenAI has one, because clients act on them: LangChain turns
`context_length_exceeded` into its own exception, SDKs retry 429 and 503 after `Retry-After`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATUS: dict[str, tuple[int, str]] = {
    # 400: the request can never be served as it is
    "invalid_json": (400, "invalid_request_error"),
    "invalid_type": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "missing_required_parameter": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "integer_below_min_value": (400, "invalid_request_error"),
    "integer_above_max_value": (400, "invalid_request_error"),
    "decimal_below_min_value": (400, "invalid_request_error"),
    "decimal_above_max_value": (400, "invalid_request_error"),
    "empty_array": (400, "invalid_request_error"),
    "array_above_max_length": (400, "invalid_request_error"),
    "string_above_max_length": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    # who and where
    "invalid_api_key": (401, "invalid_request_error"),
    "permission_denied": (403, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "request_not_found": (404, "invalid_request_error"),
    "unknown_url": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "conflict": (409, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "url_too_long": (414, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "headers_too_large": (431, "invalid_request_error"),
    # try again later
    "rate_limit_exceeded": (429, "requests"),
    "overloaded": (503, "server_error"),
    "not_ready": (503, "server_error"),
    "worker_lost": (503, "server_error"),
    "deadline_exceeded": (504, "server_error"),
    "internal_error": (500, "server_error"),
}
"""code -> (HTTP status, OpenAI `type`)."""

MAX_ECHO = 200
"""Characters of the caller's input that an error message may repeat."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error in the caller's terms.

    `param` names the field ("messages[0].content"); `retry_after_s` becomes `Retry-After`.
    Raises KeyError on an unknown code, at construction.
    """

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.status, self.type = STATUS[self.code]

    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def echo(value: object) -> str:
    """A caller's value shortened for an error message."""
    text = repr(value)
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…"
