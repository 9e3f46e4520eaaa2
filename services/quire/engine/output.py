"""What the engine hands out: one `ChoiceOutput` per choice that a step gave tokens or ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the raw logits, and the most likely alternatives."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class RemoteTimes:
    """Seconds from first scheduled to first token, for a prompt that another pod was asked for.
    They follow each other and sum to `Admission.prefill_s`."""

    worker: str
    """That was asked."""
    failed: bool
    """The prompt, or the rest of it, was computed here."""
    ask_s: float
    """Until it was accepted there, or until it had failed."""
    queue_s: float
    """There: received to first scheduled."""
    prefill_s: float
    """There: first scheduled to first token."""
    transfer_s: float
    """What of the transfer came after that, until the last block."""
    commit_s: float
    resume_s: float
    """Commit or failure to first token here."""
    cached_tokens: int = 0
    """Prompt tokens that the other pod found in its cache."""
    arrivals: tuple[tuple[float, int], ...] = ()
    """(seconds since first scheduled, blocks), beside all this."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What happened to a request before its first token."""

    cached_tokens: int
    queue_s: float
    """In the engine's queue."""
    prefill_s: float
    """First scheduled to first token."""
    inbox_s: float = 0.0
    """From the caller's message to the engine's queue, behind the step in progress."""
    first_token: float = 0.0
    """time.monotonic() of it."""
    remote: RemoteTimes | None = None
    """When another pod was asked for the prompt."""
    transferred_tokens: int = 0
    """Prompt tokens whose blocks another worker computed and pushed; none where that broke off."""


@dataclass(slots=True)
class ChoiceOutput:
    """New tokens of one choice; `position` is the index of the first of them in its output."""

    request_id: str
    choice: int
    position: int
    token_ids: list[int]
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    admission: Admission | None = None
    """On a request's first output."""
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """Entry i is for prompt token i + 1; with the first output only."""
    last_of_request: bool = False
    """No other choice of the request is open any more."""
