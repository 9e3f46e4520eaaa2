"""What is asked of the router."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quire.api.block_hash import HASH_BYTES
from quire.router.hash_table import keys_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RouteQuery:
    """A request in search of a pod."""

    hashes: bytes
    """Chained hashes of the prompt's full blocks, 16 bytes each, one after the other."""
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
        if self.expected_output < 0:
            raise ValueError(f"expected_output must not be negative, not {self.expected_output}")
        if len(self.hashes) % HASH_BYTES:
            raise ValueError(f"hashes must have {HASH_BYTES} bytes each")

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """The hashes as the index knows them."""
        return keys_of((self.hashes,))
