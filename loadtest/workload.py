"""Sessions made up from a scenario and a seed: the same for the same options, whoever runs them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.bench.datasets import FIRST_TOKEN, load_dataset
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.scenario import RequestClass, Scenario
    from quire.cli.bench.options import DatasetConfig

_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night point
home water room mother area money story fact month lot right study book eye job word business
issue side kind head house service friend father power hour game line end member law car city name
team minute idea body back parent face level office door health person art war history party
result change morning reason research girl guy moment air teacher force good
"""
WORDS = tuple(_WORDS.split())
"""Short words, about a token each for most tokenizers: prompts as text are made of them."""


@dataclass(frozen=True)
class Turn:
    """One request of a session, without its history."""

    ids: Sequence[int]
    output_len: int
    pause_s: float
    """Before it, after the answer to the one before."""


@dataclass(frozen=True)
class Session:
    """Requests that follow one another, each with all before it in its prompt."""

    request_class: str
    prefix: Sequence[int]
    turns: Sequence[Turn]

    def prompt(self, answers: Sequence[str], *, is_chat: bool) -> Any:
        """The prompt of turn `len(answers)`: messages, token ids, or text where there is history
        (whose token ids only the server knows)."""
        asked = [text(turn.ids) for turn in self.turns[: len(answers) + 1]]
        if is_chat:
            messages = [{"role": "system", "content": text(self.prefix)}] if self.prefix else []
            for question, answer in zip(asked, answers, strict=False):
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            return [*messages, {"role": "user", "content": asked[-1]}]
        if len(self.turns) == 1:
            return [*self.prefix, *self.turns[0].ids]
        parts = [text(self.prefix)] if self.prefix else []
        for question, answer in zip(asked, answers, strict=False):
            parts += [question, answer]
        return " ".join([*parts, asked[-1]])


def text(ids: Sequence[int]) -> str:
    """As many words as ids."""
    return " ".join(WORDS[i % len(WORDS)] for i in ids)


def start_times(scenario: Scenario, seed: int) -> Iterator[float]:
    """Seconds at which sessions start, up to the scenario's end. Not for traces and closed loops,
    which have no such times of their own."""
    arrivals, rng = scenario.arrivals, random.Random(f"{seed}/arrivals")
    shape = {"poisson": 1.0, "gamma": arrivals.burstiness, "constant": 0.0}[arrivals.process]
    at = 0.0
    while at < scenario.total_s:
        yield at
        gap = rng.gammavariate(shape, 1 / shape) if shape else 1.0
        at += gap / arrivals.request_rate


def sessions(scenario: Scenario, seed: int, vocab_size: int) -> Iterator[Session]:
    """Endless sessions of the scenario's classes."""
    rng = random.Random(f"{seed}/sessions")
    prefixes = {c.name: _prefixes(c, seed, vocab_size) for c in scenario.requests}
    shares = [c.share for c in scenario.requests]
    while True:
        [kind] = rng.choices(scenario.requests, shares)
        prefix = rng.choice(prefixes[kind.name]) if prefixes[kind.name] else ()
        count = max(kind.turns.draw(rng), 1)
        turns = [_turn(kind, rng, vocab_size, first=i == 0) for i in range(count)]
        yield Session(kind.name, prefix, turns)


def trace_sessions(scenario: Scenario, dataset: DatasetConfig) -> Iterator[tuple[float, Session]]:
    """(start, session of one request) for each line of the trace up to the scenario's end.

    Raises ConfigError on a bad file.
    """
    speedup = scenario.arrivals.trace_speedup
    count = _lines_until(Path(dataset.dataset_path or ""), scenario.total_s * speedup)
    for sample in load_dataset(replace(dataset, num_prompts=count)):
        ids = sample.prompt if isinstance(sample.prompt, list) else []
        turn = Turn(ids, sample.output_len, 0.0)
        yield (sample.arrival_s or 0.0) / speedup, Session("trace", (), (turn,))


def _turn(kind: RequestClass, rng: random.Random, vocab_size: int, *, first: bool) -> Turn:
    ids = rng.choices(range(FIRST_TOKEN, vocab_size), k=max(kind.input_len.draw(rng), 1))
    pause_s = 0.0 if first else rng.uniform(*kind.think_s)
    return Turn(ids, max(kind.output_len.draw(rng), 1), pause_s)


def _prefixes(kind: RequestClass, seed: int, vocab_size: int) -> list[list[int]]:
    if kind.prefix is None:
        return []
    rng = random.Random(f"{seed}/prefixes/{kind.name}")
    ids = range(FIRST_TOKEN, vocab_size)
    return [rng.choices(ids, k=kind.prefix.length) for _ in range(kind.prefix.count)]


def _lines_until(path: Path, end_s: float) -> int:
    """Lines of a trace whose time is before `end_s` after the first one's."""
    first: float | None = None
    count = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                at_s = float(json.loads(line).get("timestamp", 0)) / 1e3
                first = at_s if first is None else first
                if at_s - first > end_s:
                    break
                count += 1
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    return max(count, 1)
