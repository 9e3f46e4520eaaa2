"""Options of logging, shared by every long-running command."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.base import check_fields
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged, and in which form. Logs go to stderr."""

    log_level: str = option(
        "info", "logging", choices=("critical", "error", "warning", "info", "debug")
    )
    """Least severe level that is logged."""
    log_format: str = option("text", "logging", choices=("text", "json"))
    """text, or json for one object per line."""

    def __post_init__(self) -> None:
        check_fields(self)
