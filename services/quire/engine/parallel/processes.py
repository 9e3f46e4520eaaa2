"""Rank processes of this host: started, ended, and how they died."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from quire.config.base import from_mapping, to_mapping
from quire.config.cluster import ClusterConfig
from quire.config.engine import EngineConfig

END_S = 2.0
"""For a rank to end by itself once its connection is closed, or to be told of a failure."""


@dataclass(frozen=True)
class RankOptions:
    """Which rank a process is, and where rank 0 is."""

    engine: EngineConfig
    rank: int
    world_size: int
    local_rank: int
    """Among the ranks of its host."""
    local_size: int
    node: int
    """Its host, 0 being that of rank 0."""
    master: tuple[str, int]
    """Where rank 0 listens."""
    secret: str
    """That rank 0 knows it by."""
    fingerprint: str | None = None
    """Of rank 0's model files, where they are others than this process's."""
    known_as: str | None = None
    """Name or address under which other pods reach this host, where it is not rank 0's; the address
    of its connection to rank 0 by default."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Certificates for the way to rank 0."""
    log_level: str = "warning"

    @classmethod
    def read(cls, line: str) -> RankOptions:
        """From a line of JSON. Raises ValueError, TypeError or KeyError."""
        raw: dict[str, Any] = json.loads(line)
        parts = {
            "engine": from_mapping(EngineConfig, raw["engine"]),
            "cluster": from_mapping(ClusterConfig, raw["cluster"]),
            "master": tuple(raw["master"]),
        }
        return cls(**raw | parts)

    def line(self) -> bytes:
        """As `read` reads it."""
        # a rank knows its own secret, not the cluster's
        cluster = to_mapping(replace(self.cluster, cluster_token=None))
        raw = asdict(self) | {"engine": to_mapping(self.engine), "cluster": cluster}
        return json.dumps(raw).encode() + b"\n"


class RankProcess:
    """A rank's process. It ends with this one, at the latest when its stdin closes."""

    def __init__(self, options: RankOptions) -> None:
        command = [sys.executable, "-P", "-m", "quire.engine.parallel.rank"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(options.line())
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """It runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()

    def end(self, within_s: float = END_S) -> None:
        """Wait for its end; make it end after `within_s`."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def how_it_died(self) -> str:
        """One clause for the error message."""
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with code {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


def current_log_level() -> str:
    """For processes that this one starts."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()
