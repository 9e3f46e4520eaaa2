"""Options of the HTTP server, under vLLM's names where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import check_address, is_loopback, named_address
from quire.config.base import check_fields
from quire.config.discovery import DiscoveryConfig
from quire.config.option import option

MIB = 1 << 20
_NOT_NEGATIVE = (
    "sse_keep_alive_interval", "shutdown_timeout", "request_timeout", "max_resubmissions",
    "worker_wait",
)  # fmt: skip
_POSITIVE = ("worker_silence", "max_step_age")
_AT_LEAST_ONE = (
    "max_body_bytes", "max_open_requests", "max_stream_backlog", "tokenizer_threads",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where the HTTP server listens, who may call it, and what a request may cost.

    Raises ValueError when fields contradict each other, and when the server would be open to the
    network without an API key.
    """

    host: str = option("127.0.0.1", "server")
    """Address to listen on; 0.0.0.0 for every interface (needs --api-key)."""
    port: int = option(8000, "server")
    """TCP port; 0 for any free one."""
    uds: str | None = option(None, "server")
    """Unix socket to listen on instead of host and port."""
    root_path: str = option("", "server")
    """Path prefix under which a proxy serves this server, such as /llm."""
    ssl_keyfile: str | None = option(None, "server")
    """Private key for HTTPS (PEM)."""
    ssl_certfile: str | None = option(None, "server")
    """Certificate chain for HTTPS (PEM)."""
    sse_keep_alive_interval: float = option(15.0, "server")
    """Seconds of silence on a stream after which a comment keeps it open; 0 for never."""
    shutdown_timeout: float = option(30.0, "server")
    """Seconds that requests may still run after SIGTERM before they are cut off."""
    uvicorn_log_level: str = option(
        "warning", "server", choices=("critical", "error", "warning", "info", "debug", "trace")
    )
    """Log level of the HTTP server itself."""
    disable_access_log: bool = option(False, "server", aliases=("disable_uvicorn_access_log",))
    """No log line per request."""

    api_key: tuple[str, ...] = option((), "access", secret=True)
    """Key a client must send as a bearer token; several may be given. Better in QUIRE_API_KEY:
    other users of the machine can read a command line."""
    admin_key: str | None = option(None, "access", secret=True)
    """Key for /sleep, /wake_up and /is_sleeping, sent as a bearer token; without one they are
    refused. Better in QUIRE_ADMIN_KEY."""
    allow_unauthenticated: bool = option(False, "access")
    """Listen beyond this machine without an API key: anyone who reaches the port may use it."""
    allowed_origins: tuple[str, ...] = option((), "access")
    """Origins whose web pages may call the server (CORS); none by default."""

    served_model_name: tuple[str, ...] = option((), "served model")
    """Names clients may use for the model, the first being shown; its path or id by default."""
    chat_template: str | None = option(None, "served model")
    """Jinja chat template, as a file or as text; the tokenizer's own by default."""
    response_role: str = option("assistant", "served model")
    """Role of the generated message."""
    worker_silence: float = option(3.0, "workers")
    """Seconds without a sign of life, one is due every second, after which a worker is lost and its
    requests go on elsewhere."""
    max_step_age: float = option(10.0, "workers")
    """Seconds an engine with work may make no progress before its requests go on elsewhere."""
    max_resubmissions: int = option(3, "workers")
    """How often in a row, without a new token, a request is sent again before it fails."""
    worker_wait: float = option(60.0, "workers")
    """Seconds a request whose worker was lost waits for another one, or for it to come back."""

    max_body_bytes: int = option(16 * MIB, "limits")
    """Largest request body (suffixes K, M, G); more is a 413."""
    max_open_requests: int = option(2048, "limits")
    """Most requests in progress; more are rejected with 503 and Retry-After."""
    max_stream_backlog: int = option(1024, "limits")
    """Tokens per choice that a slow reader may fall behind before its request is ended."""
    request_timeout: float = option(0.0, "limits")
    """Seconds a request may take when it does not bring its own limit; 0 for no limit."""
    tokenizer_threads: int = option(2, "limits")
    """Threads that render templates and tokenize."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together; only one is given")
        if any(not key for key in self.api_key):
            raise ValueError("api_key must not be empty")
        if self.admin_key == "" or self.admin_key in self.api_key:
            raise ValueError("admin_key must not be empty, nor one of the API keys")
        self._check_numbers()
        if not (self.is_local or self.api_key or self.allow_unauthenticated):
            raise ValueError(
                f"host {self.host} is open to the network and no API key is set: give --api-key, "
                "keep --host 127.0.0.1, or say --allow-unauthenticated"
            )

    def _check_numbers(self) -> None:
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def is_local(self) -> bool:
        """Only this machine can reach the server."""
        return self.uds is not None or is_loopback(self.host.strip("[]"))

    @property
    def url(self) -> str:
        """Base URL for a client on this machine, without /v1; its host is idle talk with uds."""
        if self.uds is not None:
            return f"http://localhost{self.root_path}"
        scheme = "https" if self.ssl_certfile else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(self.host, self.host)
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"{scheme}://{host}:{self.port}{self.root_path}"


@dataclass(frozen=True, kw_only=True)
class UpstreamConfig(DiscoveryConfig):
    """What a gateway without workers of its own talks to."""

    worker: tuple[str, ...] = option((), "upstream")
    """gRPC address of a worker (host:port or unix:/path), several are allowed. NAME=ADDRESS gives
    it a name; without, the address is its name. Routers must call it the same."""
    router: tuple[str, ...] = option((), "upstream")
    """gRPC address of a router, several are allowed: one is asked, the others when it does not
    answer, and while none does the least busy worker is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for address in self.router:
            check_address(address)
        if self.is_fixed and not self.worker:
            raise ValueError(
                "worker: at least one address is needed, or a coordinator's, or a Service"
            )
        if len(self.workers) < len(self.worker):
            raise ValueError("worker: two workers have the same name")

    @property
    def workers(self) -> dict[str, str]:
        """Name -> address."""
        return dict(named_address(text) for text in self.worker)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer of the served model is."""

    tokenizer: str | None = option(None, "model")
    """Tokenizer folder or Hugging Face id; by default that of the model that the workers serve,
    under the name they know it by."""
    revision: str | None = option(None, "model")
    """Branch, tag or commit of a Hugging Face model."""

    def __post_init__(self) -> None:
        check_fields(self)
