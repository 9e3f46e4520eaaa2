"""What a rank beyond the first does for rank 0 beside steps; see `calls`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.parallel.calls import DROP_CACHE, answer_to
from quire.engine.runner.memory import give_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.parallel.kv import RankEndpoint
    from quire.engine.runner.backend import Backend


@dataclass(frozen=True)
class OwnHost:
    """Where a rank runs that is on another host than rank 0."""

    address: str
    known_as: str
    """Name or address under which other pods reach it."""


class Duties:
    """`answer` sends to rank 0, from any thread; `own_host` is None on rank 0's host."""

    def __init__(
        self, backend: Backend, answer: Callable[[bytes], None], own_host: OwnHost | None
    ) -> None:
        self._backend, self._answer, self._own_host = backend, answer, own_host
        self._endpoint: RankEndpoint | None = None

    def obey(self, payload: bytes) -> None:
        """Do as a message says. Raises ValueError, LookupError or TypeError for what is none."""
        message = json.loads(payload)
        if message["verb"] == DROP_CACHE:
            self._answer(answer_to(message["call"], self._drop_cache))
            return
        if self._endpoint is None:
            from quire.engine.parallel.kv import RankEndpoint

            self._endpoint = RankEndpoint(self._backend, self._answer, self._own_host)
        self._endpoint.obey(message)

    def _drop_cache(self) -> int:
        """Rank 0 holds no block, so no step runs. Returns bytes."""
        pool = self._backend.host_pool()
        return 0 if pool is None else give_back(pool)
