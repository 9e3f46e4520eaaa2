"""A request and its sequences, as the scheduler sees them.

A request asks for `n` choices; each choice is one `Sequence`. All tokens of a sequence, prompt and
output, are one list; how far the KV cache has caught up with it is one number:

    tokens   [0 ............ num_prompt ............ num_tokens)[drawn, not known yet)
    in cache [0 .... num_computed)                                   chases num_planned

There is no "prefill" or "decode" state: a prefill, a chunk of one, a decode step, a recompute after
preemption and a prefix-cache hit are all `num_computed` catching up with `num_planned`, which is
`num_tokens` and one more while a step under way draws the next token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from quire.api import block_hash

if TYPE_CHECKING:
    from quire.api.sampling import SamplingParams
    from quire.engine.output import RemoteTimes, TokenLogprob

BLOCK_SIZE = block_hash.BLOCK_SIZE


class FinishReason(Enum):
    """Why a choice ended. Values are OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"
    """The model gave no finite number for the choice's next token."""


class RemotePrompt(Protocol):
    """A prompt that another pod computes, as its owner outside the engine keeps it."""

    def fence(self) -> None:
        """Return when nobody writes into the request's blocks any more. On the engine thread."""

    def times(self, scheduled: float, first_token: float) -> RemoteTimes | None:
        """What the time between the two was spent on; None when no other pod was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """What a caller asks of the engine. Validated by `Engine.add_request`."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """Seed of the draws; `params.seed` or one that the caller drew."""
    priority: int = 0
    """Lower is served first, under the priority policy."""
    deadline: float | None = None
    """time.monotonic() after which the answer is of no use."""
    cache_salt: bytes = b""
    """Seeds the block hashes: prefixes are shared between requests of the same salt only."""
    resumed: dict[int, list[int]] = field(default_factory=dict)
    """Choices to go on with and the tokens that earlier attempts gave them; empty at first. Choices
    not listed have ended."""
    remote: RemotePrompt | None = None
    """Given when another pod computes the prompt."""
    received: float = field(default_factory=time.monotonic)
    """time.monotonic() when the caller's message was read."""
    is_exported: bool = False
    """The prompt's blocks are for another pod: report them, and hold them until released."""


@dataclass(eq=False, slots=True)
class RequestState:
    """A request inside the engine: what its sequences share, and its times."""

    request: EngineRequest
    max_tokens: int
    """Most output tokens per choice, within the model's context."""
    stop_token_ids: frozenset[int]
    """Tokens that end a choice, end-of-sequence included unless ignored."""
    arrival: float = field(default_factory=time.monotonic)
    first_scheduled: float | None = None
    first_token: float | None = None
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when first scheduled."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Entry i scores prompt token i + 1; grows as the prompt is computed, kept after preemption."""
    open_choices: int = 0
    is_remote: bool = False
    """Another pod is to compute the prompt, and has not failed to."""
    order: tuple[int, float] = (0, 0.0)
    """Smaller is served first and preempted last: (priority if used, arrival)."""
    draws_by_history: bool = field(init=False)
    """The logits of a draw are edited by the tokens before it, which the host has to know."""
    is_plain: bool = field(init=False)
    """Of one choice, whose tokens are drawn from the raw logits and alone are wanted: a step looks
    no further into it."""

    def __post_init__(self) -> None:
        params = self.request.params
        has_long_words = any(len(word) > 1 for word in params.bad_words_ids)
        self.draws_by_history = params.has_penalties or has_long_words
        self.is_plain = (
            params.n == 1
            and params.logprobs is None
            and not params.edits_logits
            and not params.min_tokens
        )


class Sequence:
    """One choice of a request.

    What every step looks at is kept here, beside what it is about: the model has had the caches in
    between, so that each further object a step looks into is waited for.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "choice",
        "draw",
        "finished",
        "hash_root",
        "is_new",
        "is_plain",
        "max_len",
        "num_computed",
        "num_forks",
        "num_pending",
        "num_promised",
        "num_prompt",
        "num_registered",
        "num_writable",
        "request_id",
        "seat",
        "state",
        "stop_token_ids",
        "tokens",
    )

    def __init__(self, state: RequestState, choice: int, tokens: list[int], root: bytes) -> None:
        self.state = state
        self.choice = choice
        self.tokens = tokens
        self.num_prompt = len(state.request.prompt_token_ids)
        self.request_id = state.request.request_id
        self.stop_token_ids = state.stop_token_ids
        self.is_plain = state.is_plain
        self.max_len = self.num_prompt + state.max_tokens
        """Tokens with which it ends, whatever they are."""
        self.is_new = True
        """No token was handed out yet."""
        self.num_computed = 0
        """Tokens whose KV is in the cache once the steps planned so far have run."""
        self.num_pending = 0
        """Tokens that steps under way draw."""
        self.draw = -1
        """Which draw of the newest of those steps is this sequence's."""
        self.num_forks = 0
        """Further choices to fork off when the first token is drawn."""
        self.num_promised = 0
        """Blocks of the pool's promise that are this sequence's."""
        self.block_table: list[int] = []
        self.hash_root = root
        self.block_hashes = block_hash.extend(root, tokens)
        """Hashes of the full blocks of `tokens`."""
        self.num_registered = 0
        """Leading blocks of the table that are registered in the prefix cache."""
        self.num_writable = 0
        """Tokens that its blocks hold with no other sequence in the one being filled; 0 where that
        has to be looked at."""
        self.seat = -1
        """Row of the scheduler's per-sequence arrays while running."""
        self.finished = False

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Output tokens known."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_planned(self) -> int:
        """Tokens known once the steps under way have run."""
        return len(self.tokens) + self.num_pending

    @property
    def is_prefill(self) -> bool:
        """More than the newest token is missing in the cache."""
        return self.num_planned - self.num_computed > 1

    @property
    def is_ending(self) -> bool:
        """With the pending tokens it is as long as it may become."""
        return self.num_planned >= self.max_len

    def append(self, token: int) -> None:
        """Add a drawn token and, when it fills a block, that block's hash."""
        tokens = self.tokens
        tokens.append(token)
        if len(tokens) % BLOCK_SIZE == 0:
            parent = self.block_hashes[-1] if self.block_hashes else self.hash_root
            self.block_hashes += block_hash.extend(parent, tokens, len(tokens) - BLOCK_SIZE)

    def fork(self, choice: int) -> Sequence:
        """Another choice with the same tokens so far, pending ones too. The caller shares the
        blocks."""
        child = Sequence.__new__(Sequence)
        child.state, child.choice, child.tokens = self.state, choice, self.tokens.copy()
        child.request_id, child.stop_token_ids = self.request_id, self.stop_token_ids
        child.is_plain, child.is_new = self.is_plain, self.is_new
        child.num_prompt, child.max_len = self.num_prompt, self.max_len
        child.num_computed = self.num_computed
        child.num_forks = child.num_promised = 0
        child.num_pending, child.draw = self.num_pending, -1
        child.num_writable = self.num_writable = 0
        child.block_table = self.block_table.copy()
        child.hash_root, child.block_hashes = self.hash_root, self.block_hashes.copy()
        child.num_registered = self.num_registered
        child.seat, child.finished = -1, False
        return child
