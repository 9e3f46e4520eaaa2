"""What every engine is asked to do: decode at a batch size, mixed lengths, prefill.

Prompts are random ids, never twice, the same for every engine in the same round.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.compare.process import Answer

FIRST_TOKEN = 10
PROMPT = 128
PREFILL_PROMPTS = 32


@dataclass(frozen=True)
class Size:
    """How much of each is asked of a shape, so that a round takes seconds."""

    vocab_size: int
    decode_outputs: int
    mix: tuple[int, tuple[int, int], tuple[int, int]]
    """Requests, prompt lengths, output lengths."""


SIZES = {
    "tiny": Size(8192, 17, (8, (16, 64), (8, 16))),
    "S": Size(8192, 129, (64, (128, 512), (64, 128))),
    "M": Size(49152, 65, (32, (128, 512), (64, 128))),
    "L": Size(151936, 33, (16, (128, 384), (48, 80))),
}


class Engine(Protocol):
    """Whom a workload is asked of."""

    def ask(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, tokens: bool = False
    ) -> Answer:
        """Generate."""


@dataclass(frozen=True)
class Workload:
    """One line of the comparison; `measure(engine, round)` gives tokens per second."""

    name: str
    measure: Callable[[Engine, int], float]


def workloads(shape: str, names: Sequence[str], batches: Sequence[int]) -> list[Workload]:
    """Those of `names` (decode, mix, prefill) for a shape, in order."""
    size = SIZES[shape]
    made = []
    if "decode" in names:
        made += [Workload(f"decode B={b}", _decode(size, b)) for b in batches]
    if "mix" in names:
        made.append(Workload("mix", _mix(size)))
    if "prefill" in names:
        made.append(Workload("prefill", _prefill(size)))
    return made


def _decode(size: Size, batch: int) -> Callable[[Engine, int], float]:
    """Output tokens per second behind the first ones: the time of N outputs less that of one."""
    count = size.decode_outputs

    def measure(engine: Engine, number: int) -> float:
        first = _prompts(size, batch, (PROMPT, PROMPT), f"decode {batch} {number} first")
        prompts = _prompts(size, batch, (PROMPT, PROMPT), f"decode {batch} {number}")
        one = engine.ask(first, [1] * batch).seconds
        many = engine.ask(prompts, [count] * batch).seconds
        return batch * (count - 1) / max(many - one, 1e-9)

    return measure


def _mix(size: Size) -> Callable[[Engine, int], float]:
    """Output tokens per second of requests of all lengths, asked for at once."""
    count, prompt_lens, output_lens = size.mix

    def measure(engine: Engine, number: int) -> float:
        rng = random.Random(f"mix outputs {number}")
        asked = [rng.randint(*output_lens) for _ in range(count)]
        answer = engine.ask(_prompts(size, count, prompt_lens, f"mix {number}"), asked)
        return answer.output_tokens / answer.seconds

    return measure


def _prefill(size: Size) -> Callable[[Engine, int], float]:
    """Prompt tokens per second of 32 prompts of 128 tokens, with one output token each."""

    def measure(engine: Engine, number: int) -> float:
        lengths = (PROMPT, PROMPT)
        prompts = _prompts(size, PREFILL_PROMPTS, lengths, f"prefill {number}")
        answer = engine.ask(prompts, [1] * PREFILL_PROMPTS)
        return PREFILL_PROMPTS * PROMPT / answer.seconds

    return measure


def _prompts(size: Size, count: int, lengths: tuple[int, int], seed: str) -> list[list[int]]:
    rng = random.Random(seed)
    ids = range(FIRST_TOKEN, size.vocab_size)
    return [rng.choices(ids, k=rng.randint(*lengths)) for _ in range(count)]
