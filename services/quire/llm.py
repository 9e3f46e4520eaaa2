"""`LLM`: the engine in this process, for scripts. Names and results as in vLLM.

from quire import LLM, SamplingParams
llm = LLM("demo")
[answer] = llm.generate("import os\\n\\ndef ", SamplingParams(temperature=0, max_tokens=32))
print(answer.outputs[0].text)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quire.api.outputs import CompletionOutput, Logprob, RequestOutput
from quire.api.sampling import SamplingParams, new_seed
from quire.config.base import from_mapping
from quire.config.engine import EngineConfig
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.text.chat_template import ChatRequest
from quire.text.folder import resolve_folder, sampling_defaults
from quire.text.output import ChoiceText, End
from quire.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quire.engine.output import ChoiceOutput, TokenLogprob
    from quire.engine.runner.load import Startup

Prompt = "str | Sequence[int] | Mapping[str, Any]"
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""


@dataclass(slots=True)
class _Growing:
    """A choice: its text, and the tokens that the text has not taken in yet."""

    text: ChoiceText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class _Live:
    """A request on its way through the engine."""

    result: RequestOutput
    params: SamplingParams
    choices: list[_Growing]

    @property
    def ended(self) -> bool:
        """Every choice has a finish reason, be it the engine's or a stop string's."""
        return all(choice.text.finish_reason is not None for choice in self.choices)


class LLM:
    """A model loaded in this process, with continuous batching over whatever is asked at once.

    Keyword arguments are the fields of `EngineConfig`, vLLM's spellings included. Raises ValueError
    when the model cannot be loaded as asked.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self.config = from_mapping(EngineConfig, {"model": model, **options})
        with _LoadBar() as bar:
            self.engine = Engine.load(self.config, bar)
        folder = self.engine.model.folder
        if self.config.tokenizer is not None:
            folder = resolve_folder(self.config.tokenizer)
        self._tokenizer = Tokenizer(folder)
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given no parameters: the model's own defaults."""
        return SamplingParams(**sampling_defaults(self._tokenizer.folder))

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts (one, or a list; see `Prompt`), in their order.

        One `SamplingParams` for all or one each. Raises ApiError on the first prompt that cannot be
        served; the engine is left without requests whatever happens.
        """
        parsed = [self._parse(prompt) for prompt in _as_list(prompts)]
        return self._run(parsed, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations: a list of messages, or a list of such lists.

        `template_options` are fields of `ChatRequest`, such as add_generation_prompt.
        """
        conversations = [messages] if isinstance(messages[0], dict) else messages
        requests = [ChatRequest(messages=m, **template_options) for m in conversations]
        render, encode = self._tokenizer.render_chat, self._tokenizer.encode_chat
        parsed: list[tuple[str | None, list[int]]] = [(render(r), encode(r)) for r in requests]
        return self._run(parsed, sampling_params, use_tqdm)

    def reset_prefix_cache(self) -> int:
        """Forget cached prefixes; returns how many blocks were."""
        return self.engine.reset_prefix_cache()

    def _parse(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        if isinstance(prompt, dict):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            return self._parse(prompt["prompt"])
        return None, list(prompt)

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        each = _broadcast(sampling_params or self.get_default_sampling_params(), len(prompts))
        live: dict[str, _Live] = {}
        results: list[RequestOutput] = []
        pending = zip(prompts, each, strict=True)
        with tqdm(total=len(prompts), desc="Prompts", disable=not use_tqdm) as bar:
            try:
                while self._feed(pending, live, results) or live:
                    self._take(self.engine.step(), live, bar.update)
            finally:
                for request_id in live:
                    self.engine.abort(request_id)
        return results

    def _feed(
        self,
        pending: Iterator[tuple[tuple[str | None, list[int]], SamplingParams]],
        live: dict[str, _Live],
        results: list[RequestOutput],
    ) -> bool:
        """Submit prompts while the engine's queue has room for them; False when none are left."""
        waiting = self.engine.scheduler.waiting
        # Far more than one step admits, and within both bounds of the queue.
        while len(waiting) < min(2 * self.config.max_num_seqs, self.config.max_num_queued_reqs):
            item = next(pending, None)
            if item is None:
                return False
            (text, ids), params = item
            request_id = str(next(self._ids))
            if params.bad_words:
                words = self._tokenizer.bad_words_ids(params.bad_words)
                params = replace(params, bad_words_ids=words)
            seed = new_seed() if params.seed is None else params.seed
            self.engine.add_request(
                EngineRequest(request_id=request_id, prompt_token_ids=ids, params=params, seed=seed)
            )
            choices = [CompletionOutput(i) for i in range(params.n)]
            result = RequestOutput(request_id, text, ids, choices)
            growing = [_Growing(ChoiceText(self._tokenizer, params)) for _ in range(params.n)]
            live[request_id] = _Live(result, params, growing)
            results.append(result)
        return True

    def _take(
        self, outputs: list[ChoiceOutput], live: dict[str, _Live], done: Callable[[int], Any]
    ) -> None:
        for output in outputs:
            entry = live.get(output.request_id)
            if entry is None:
                continue
            if self._extend(entry, output) and entry.ended:
                entry.result.finished = True
                del live[output.request_id]
                if not output.last_of_request:
                    self.engine.abort(output.request_id)  # a stop string ended it
                done(1)

    def _extend(self, entry: _Live, output: ChoiceOutput) -> bool:
        """Take in a choice's new tokens; returns whether they are its last.

        They become text when it is wanted: for stop strings as they come, else at the end.
        """
        growing = entry.choices[output.choice]
        growing.token_ids += output.token_ids
        if output.logprobs:
            growing.logprobs += output.logprobs
        if output.admission is not None:
            entry.result.num_cached_tokens = output.admission.cached_tokens
            if entry.params.prompt_logprobs is not None:
                self._score_prompt(entry.result, output.prompt_logprobs)
        if output.finish_reason is None:
            return bool(entry.params.stop) and self._push(entry, output.choice, None)
        end = End(output.finish_reason.value, output.stop_token_id)
        return self._push(entry, output.choice, end)

    def _push(self, entry: _Live, index: int, end: End | None) -> bool:
        """Make text of the tokens that have come; returns whether the choice ends with them."""
        choice, growing = entry.result.outputs[index], entry.choices[index]
        token_ids, logprobs = growing.token_ids, growing.logprobs
        growing.token_ids, growing.logprobs = [], []
        delta = growing.text.push(token_ids, logprobs, end)
        choice.token_ids += token_ids[: delta.num_tokens]
        if entry.params.logprobs is not None and delta.num_tokens:
            pairs = zip(token_ids, logprobs[: delta.num_tokens], strict=False)
            entries = [self._logprobs(token, scored) for token, scored in pairs]
            choice.logprobs = (choice.logprobs or []) + entries
            total = sum(s.logprob for s in logprobs[: delta.num_tokens])
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + total
        if delta.finish_reason is None:
            return False
        choice.text = growing.text.text
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        return True

    def _score_prompt(self, result: RequestOutput, scores: Sequence[TokenLogprob]) -> None:
        pairs = zip(result.prompt_token_ids[1:], scores, strict=True)
        result.prompt_logprobs = [None, *(self._logprobs(*pair) for pair in pairs)]

    def _logprobs(self, token: int, scored: TokenLogprob) -> dict[int, Logprob]:
        """The drawn token first, then the most likely ones, as vLLM orders them."""
        name = self._tokenizer.token_text
        found = {token: Logprob(scored.logprob, scored.rank, name(token))}
        tops = zip(scored.top_ids, scored.top_logprobs, strict=True)
        for rank, (top, logprob) in enumerate(tops, start=1):
            found.setdefault(top, Logprob(logprob, rank, name(top)))
        return found


class _LoadBar:
    """Shows weights loading, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _LoadBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, startup: Startup) -> None:
        if startup.unit != "bytes":
            return
        if self._bar is None:
            self._bar = tqdm(
                total=startup.total, desc="Loading", unit="B", unit_scale=True, disable=None
            )
        self._bar.update(startup.done - self._bar.n)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or many: a text, a dict and a list of token ids are one."""
    if isinstance(prompts, str | dict):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _broadcast(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts")
    return params
