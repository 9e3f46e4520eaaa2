"""What happened to a request before its first token, as its first output tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.engine.output import Admission

if TYPE_CHECKING:
    from quire.engine.request import RequestState


def admission(state: RequestState) -> Admission:
    """Of a request whose first token has just come."""
    request, cached = state.request, state.num_cached_tokens
    first_token = state.first_token or state.arrival
    scheduled = state.first_scheduled or first_token
    remote = request.remote
    return Admission(
        cached_tokens=cached,
        queue_s=scheduled - state.arrival,
        prefill_s=first_token - scheduled,
        inbox_s=state.arrival - request.received,
        first_token=first_token,
        remote=None if remote is None else remote.times(scheduled, first_token),
        transferred_tokens=len(request.prompt_token_ids) - cached if state.is_remote else 0,
    )
