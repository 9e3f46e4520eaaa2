"""The requests of a benchmark: made up from a seed, or read from a file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.cli.bench.options import DatasetConfig

FIRST_TOKEN = 10
"""Lower ids tend to be control tokens."""
TRACE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
CHARS_PER_TOKEN = 4
"""Of English text, roughly; decides the output length of a recorded conversation."""
MIN_TEXT = 4
"""Characters below which a turn of a conversation is not worth a request."""


@dataclass(frozen=True)
class Sample:
    """One request to make."""

    prompt: str | list[int]
    """Text, or token ids."""
    output_len: int
    arrival_s: float | None = None
    """Seconds after the first request, when the dataset says so."""

    @property
    def prompt_len(self) -> int | None:
        """Tokens, None when only the server can tell."""
        return len(self.prompt) if isinstance(self.prompt, list) else None


def load_dataset(config: DatasetConfig) -> list[Sample]:
    """The requests; the same for the same options. Raises ConfigError on a bad file."""
    make = {
        "random": _random,
        "prefix_repetition": _prefix_repetition,
        "sharegpt": _sharegpt,
        "mooncake": _mooncake,
    }[config.dataset_name]
    samples = list(islice(make(config), config.num_prompts))
    if not samples:
        raise ConfigError(f"{config.dataset_path} holds no usable request")
    return samples


def _tokens(config: DatasetConfig, rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(FIRST_TOKEN, config.vocab_size), k=count)


def _random(config: DatasetConfig) -> Iterator[Sample]:
    rng = random.Random(config.seed)
    prefix = _tokens(config, rng, config.random_prefix_len)

    def around(length: int) -> int:
        spread = int(length * config.random_range_ratio)
        return max(1, rng.randint(length - spread, length + spread))

    while True:
        length = around(config.random_input_len)
        output = around(config.random_output_len)
        yield Sample(prefix + _tokens(config, rng, length), output)


def _prefix_repetition(config: DatasetConfig) -> Iterator[Sample]:
    rng = random.Random(config.seed)
    prefixes = [
        _tokens(config, rng, config.prefix_repetition_prefix_len)
        for _ in range(config.prefix_repetition_num_prefixes)
    ]
    while True:
        # Every prefix once before any again, in an order of their own each time.
        for prefix in rng.sample(prefixes, len(prefixes)):
            suffix = _tokens(config, rng, config.prefix_repetition_suffix_len)
            yield Sample(prefix + suffix, config.prefix_repetition_output_len)


def _sharegpt(config: DatasetConfig) -> Iterator[Sample]:
    """First question of each conversation, repeated from the start when there are too few."""
    try:
        conversations = json.loads(_read(config))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{config.dataset_path} is not JSON: {error}") from None
    pairs = [pair for pair in map(_first_exchange, conversations) if pair is not None]
    random.Random(config.seed).shuffle(pairs)
    while pairs:
        for question, answer in pairs:
            estimate = max(1, len(answer) // CHARS_PER_TOKEN)
            yield Sample(question, _cut(config.sharegpt_output_len or estimate, config))


def _first_exchange(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") or entry.get("conversation") or entry.get("messages") or []
    texts = [turn.get("value", turn.get("content", "")) for turn in turns[:2]]
    if len(texts) < 2 or min(map(len, texts)) < MIN_TEXT:
        return None
    return texts[0], texts[1]


def _mooncake(config: DatasetConfig) -> Iterator[Sample]:
    """Prompts whose blocks are equal where the trace's hashes are; times start at 0."""
    first: float | None = None
    for number, line in enumerate(_read(config).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            at_s = float(entry.get("timestamp", 0)) / 1e3
            length, output = int(entry["input_length"]), int(entry["output_length"])
            hashes = entry.get("hash_ids", [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{config.dataset_path}:{number}: {error!r}") from None
        first = at_s if first is None else first
        prompt = _trace_prompt(config, hashes, max(1, min(length, config.max_input_len or length)))
        yield Sample(prompt, _cut(max(1, output), config), at_s - first)


def _trace_prompt(config: DatasetConfig, hashes: list[int], length: int) -> list[int]:
    prompt: list[int] = []
    for block in hashes:
        if len(prompt) >= length:
            break
        prompt += _tokens(config, random.Random(f"{config.seed}/{block}"), TRACE_BLOCK)
    missing = length - len(prompt)
    if missing > 0:  # a trace without hashes, or with too few
        rng = random.Random(f"{config.seed}/rest/{hashes[-1:]}/{length}")
        prompt += _tokens(config, rng, missing)
    return prompt[:length]


def _cut(output_len: int, config: DatasetConfig) -> int:
    return min(output_len, config.max_output_len or output_len)


def _read(config: DatasetConfig) -> str:
    try:
        return Path(config.dataset_path or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {config.dataset_path}: {error}") from None
