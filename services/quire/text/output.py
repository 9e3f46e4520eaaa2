"""One choice's tokens as they become text: detokenized, watched for stop strings, measured.

Used by the gateway for every choice of a stream and by `LLM` in process. A pure function of the
tokens pushed: cut into other batches, or replayed after a move to another pod, they give the same
text, the same logprob offsets and the same end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from quire.api.tokens import TokenText, TopToken
from quire.text.stop import StopMatch, StopMatcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.api.sampling import SamplingParams
    from quire.text.tokenizer import Tokenizer


class Scored(Protocol):
    """A drawn token's log-probability, as the engine and the wire have it."""

    @property
    def logprob(self) -> float: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def top_ids(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def top_logprobs(self) -> Sequence[float]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class End:
    """Why the engine ended a choice."""

    reason: str
    """stop, length, abort or deadline."""
    stop_token_id: int | None = None


class TextDelta(NamedTuple):  # made per token: a third of a frozen dataclass's cost
    """What a push added to a choice."""

    text: str = ""
    num_tokens: int = 0
    """Tokens taken in; fewer than given when a stop string ended the choice among them."""
    tokens: tuple[TokenText, ...] = ()
    """One per token taken in, when log-probabilities were given."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the choice; None for end-of-sequence."""


NOTHING = TextDelta()


class ChoiceText:
    """The text of one choice, growing. Push tokens until `finish_reason` is set."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop)
        self._num_chars = 0  # detokenized so far, shown or held back
        self._parts: list[str] = []
        self.num_tokens = 0
        """Tokens of the choice so far."""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """All the text that pushes have returned."""
        return "".join(self._parts)

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[Scored] = (), end: End | None = None
    ) -> TextDelta:
        """Take in new tokens; `end` says that the engine ended the choice with them.

        Returns NOTHING once the choice has ended.
        """
        if self.finish_reason is not None:
            return NOTHING
        shown: list[str] = []
        scored: list[TokenText] = []
        taken = 0
        for i, token_id in enumerate(token_ids):
            taken += 1
            if i < len(logprobs):
                scored.append(self._score(token_id, logprobs[i]))
            is_last = i + 1 == len(token_ids)
            if not (is_last and end is not None and self._is_silent(token_id, end)):
                self._take(token_id, shown)
            self.num_tokens += 1
            if self.finish_reason is not None:
                break
        if end is not None and self.finish_reason is None:
            self._finish(end, shown)
        self._parts.extend(shown)
        return TextDelta("".join(shown), taken, tuple(scored), self.finish_reason, self.stop_reason)

    def _take(self, token_id: int, shown: list[str]) -> None:
        text = self._detokenizer.push(token_id) if self._params.detokenize else ""
        if text:
            self._show(text, shown, watched=self.num_tokens >= self._params.min_tokens)

    def _show(self, text: str, shown: list[str], *, watched: bool) -> None:
        self._num_chars += len(text)
        if not watched:
            shown.append(self._stop.skip(text))
            return
        out = self._stop.push(text)
        if isinstance(out, StopMatch):
            self.finish_reason, self.stop_reason = "stop", out.stop
            out = out.text + (out.stop if self._params.include_stop_str_in_output else "")
        shown.append(out)

    def _finish(self, end: End, shown: list[str]) -> None:
        rest = self._detokenizer.flush()
        if rest:
            self._show(rest, shown, watched=self.num_tokens >= self._params.min_tokens)
        if self.finish_reason is None:
            self.finish_reason = end.reason
            if end.stop_token_id in self._params.stop_token_ids:
                self.stop_reason = end.stop_token_id
        shown.append(self._stop.flush())

    def _is_silent(self, token_id: int, end: End) -> bool:
        """The token that ended the choice is not part of its text, unless asked for."""
        stopped = end.reason == "stop" and end.stop_token_id in (None, token_id)
        return stopped and not self._params.include_stop_str_in_output

    def _score(self, token_id: int, scored: Scored) -> TokenText:
        name = self._tokenizer
        pairs = zip(scored.top_ids, scored.top_logprobs, strict=True)
        top = tuple(TopToken(i, name.token_text(i), name.token_bytes(i), p) for i, p in pairs)
        data = name.token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        return TokenText(token_id, text, data, self._num_chars, scored.logprob, scored.rank, top)
