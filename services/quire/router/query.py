"""What is asked of the router."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quire.router.hash_table import keys_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RouteQuery:
    """A request in search of a pod."""

    hashes: Sequence[bytes]
    """Chained hashes of the prompt's full blocks, 16 bytes each."""
    prompt_len: int
    """Tokens."""
    model: str = ""
    """Empty: any."""
    expected_output: int = 256
    """Tokens the answer will have, as far as the caller can tell."""
    priority: int = 0
    """Lower is served first. Kept with the decision; a pod's queue acts on it."""
    deadline_s: float | None = None
    """Seconds from now after which the first token is of no use."""
    session: str = ""
    """Requests of one session go to one pod, under the session policy."""
    request_id: str = ""
    exclude: frozenset[str] = field(default_factory=frozenset)
    """Pods that must not be chosen, for decode or prefill: they failed this request."""

    def __post_init__(self) -> None:
        if self.prompt_len < 1:
            raise ValueError(f"prompt_len must be at least 1, not {self.prompt_len}")
        if any(len(h) != 16 for h in self.hashes):
            raise ValueError("hashes must have 16 bytes each")

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """The hashes as the index knows them."""
        return keys_of(self.hashes)
