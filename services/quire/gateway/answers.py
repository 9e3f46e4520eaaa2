"""A generation in the shapes of the two APIs: chunks of a stream, or one body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from quire.api.openai import (
    ChunkTemplate,
    FinishedChoice,
    chat_completion,
    chat_logprobs,
    completion_logprobs,
    text_completion,
)
from quire.api.sse import encode_json
from quire.gateway.prompt_scores import prompt_logprobs, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.api.openai import Head
    from quire.api.tokens import TokenText
    from quire.gateway.generation import Generation
    from quire.gateway.replies import Replies
    from quire.gateway.traffic import RequestClock
    from quire.text.output import TextDelta


class Answer(Protocol):
    """One API's shapes. Chunks end open, before the last brace, so that usage may follow."""

    kind: str
    """`object` of a chunk."""
    head: Head

    def opening(self, choice: int) -> list[bytes]:
        """Chunks before a choice's first text."""

    def chunks(self, choice: int, delta: TextDelta) -> list[bytes]:
        """Chunks for what is new."""

    def body(self, tokens: Sequence[list[TokenText]]) -> dict[str, Any]:
        """The whole answer; `tokens` are the scored tokens of each choice."""


class ChatAnswer:
    """Shapes of /v1/chat/completions."""

    kind = "chat.completion.chunk"

    def __init__(self, head: Head, generation: Generation, role: str) -> None:
        self.head = head
        self._generation = generation
        self._role = role
        self._num_top = generation.request.num_top
        frame = (b'"delta":{"content":', b"}")
        self._templates = [
            ChunkTemplate(head, self.kind, i, frame) for i in range(len(generation.choices))
        ]

    def opening(self, choice: int) -> list[bytes]:
        """The role, once per choice."""
        delta = encode_json({"role": self._role, "content": ""})
        return [self._templates[choice].full(b'"delta":' + delta)]

    def chunks(self, choice: int, delta: TextDelta) -> list[bytes]:
        """Text, and the end in a chunk of its own."""
        template = self._templates[choice]
        made = []
        if self._num_top is not None and delta.tokens:
            inner = b'"delta":' + encode_json({"content": delta.text})
            logprobs = chat_logprobs(delta.tokens, self._num_top)
            made.append(template.full(inner, logprobs=logprobs))
        elif delta.text:
            made.append(template.text(delta.text))
        if delta.finish_reason is not None:
            made.append(
                template.full(
                    b'"delta":{}', finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
                )
            )
        return made

    def body(self, tokens: Sequence[list[TokenText]]) -> dict[str, Any]:
        """The whole answer."""
        generation, num_top = self._generation, self._num_top
        wants_prompt = generation.request.params.prompt_logprobs is not None
        choices = [
            FinishedChoice(
                index=i,
                text=choice.text,
                finish_reason=choice.finish_reason or "stop",
                stop_reason=choice.stop_reason,
                logprobs=None if num_top is None else chat_logprobs(tokens[i], num_top),
                prompt_logprobs=prompt_logprobs(generation, 0) if wants_prompt else None,
            )
            for i, choice in enumerate(generation.choices)
        ]
        return chat_completion(self.head, self._role, choices, generation.usage)


class CompletionAnswer:
    """Shapes of /v1/completions."""

    kind = "text_completion"

    def __init__(self, head: Head, generation: Generation) -> None:
        self.head = head
        self._generation = generation
        self._num_top = generation.request.num_top
        self._templates = [
            ChunkTemplate(head, self.kind, i, (b'"text":', b""))
            for i in range(len(generation.choices))
        ]

    def opening(self, choice: int) -> list[bytes]:
        """The echoed prompt, if asked for."""
        if not self._generation.request.echo:
            return []
        tokens = self._prompt_tokens(choice)
        logprobs = self._logprobs(tokens) if tokens else None
        inner = b'"text":' + encode_json(self._prompt_text(choice))
        return [self._templates[choice].full(inner, logprobs=logprobs)]

    def chunks(self, choice: int, delta: TextDelta) -> list[bytes]:
        """Text, and the end in a chunk of its own."""
        template = self._templates[choice]
        made = []
        if self._scores_only:
            pass
        elif self._num_top is not None and delta.tokens:
            logprobs = self._logprobs(delta.tokens, offset=len(self._prompt_text(choice)))
            inner = b'"text":' + encode_json(delta.text)
            made.append(template.full(inner, logprobs=logprobs))
        elif delta.text:
            made.append(template.text(delta.text))
        if delta.finish_reason is not None:
            made.append(
                template.full(
                    b'"text":""', finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
                )
            )
        return made

    def body(self, tokens: Sequence[list[TokenText]]) -> dict[str, Any]:
        """The whole answer."""
        generation = self._generation
        return text_completion(
            self.head,
            [self._choice(i, tokens[i]) for i in range(len(generation.choices))],
            generation.usage,
        )

    def _choice(self, i: int, tokens: list[TokenText]) -> FinishedChoice:
        generation = self._generation
        choice, prompt_text = generation.choices[i], self._prompt_text(i)
        logprobs = None
        if self._num_top is not None:
            drawn = [] if self._scores_only else tokens
            logprobs = self._logprobs(drawn, offset=len(prompt_text))
            before = self._logprobs(self._prompt_tokens(i))
            for key, values in before.items():
                # null where no alternatives were asked for
                logprobs[key] = None if values is None else values + logprobs[key]
        request = generation.request
        wants_prompt = request.params.prompt_logprobs is not None and not request.echo
        return FinishedChoice(
            index=i,
            text=prompt_text + ("" if self._scores_only else choice.text),
            finish_reason=choice.finish_reason or "length",
            stop_reason=choice.stop_reason,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs(generation, i // generation.n)
            if wants_prompt
            else None,
        )

    @property
    def _scores_only(self) -> bool:
        return self._generation.request.max_tokens == 0

    def _prompt_text(self, choice: int) -> str:
        return self._generation.prompts[choice // self._generation.n].text

    def _prompt_tokens(self, choice: int) -> Sequence[TokenText]:
        if self._num_top is None or not self._generation.request.echo:
            return ()
        return prompt_tokens(self._generation, choice // self._generation.n)

    def _logprobs(self, tokens: Sequence[TokenText], *, offset: int = 0) -> dict[str, Any]:
        return completion_logprobs(tokens, self._num_top or 0, offset=offset)


async def collect(
    generation: Generation, answer: Answer, clock: RequestClock, replies: Replies
) -> dict[str, Any]:
    """Wait for every choice to end; the whole answer. Raises ApiError."""
    tokens: list[list[TokenText]] = [[] for _ in generation.choices]
    while not generation.done:
        for choice, delta in generation.take(await replies.next(), replies, clock):
            tokens[choice].extend(delta.tokens)
        clock.handed_over()
    return answer.body(tokens)
