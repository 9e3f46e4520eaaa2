"""`quire bench step`: where the time of a step goes, inside the model and around it.

    schedule   which tokens, which blocks              execute   the model
    prepare    the step's arrays                       sample    drawing tokens
    update     tokens to sequences, blocks to cache    output    text for the caller
    other      the rest of the loop

Phases are timed by wrapping the engine's own methods; a wrapper costs about a microsecond.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import ResultConfig, StepConfig
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, UsageError, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.llm import LLM

COMMAND = Command(
    prog="quire bench step",
    summary="Measure what a step costs inside the model and around it, by batch size.",
    owners=(EngineConfig, StepConfig, ResultConfig),
    positional="model",
)
PHASES = ("schedule", "prepare", "execute", "sample", "update", "output", "other")
MODEL_PHASE = "execute"
MAX_ROWS = 10_000
PREFILL_REPEATS = 3


@dataclass(frozen=True)
class StepRow:
    """One step. Times are seconds."""

    decodes: int
    """Sequences that got one token."""
    prompt_tokens: int
    context_tokens: int
    """Tokens in the cache of all its sequences."""
    seconds: float
    phases: dict[str, float]


@dataclass
class StepClock:
    """Times the phases of an engine's steps until `detach`."""

    llm: LLM
    rows: list[StepRow] = field(default_factory=list)
    _spent: dict[str, float] = field(default_factory=dict)
    _wrapped: list[tuple[object, str]] = field(default_factory=list)
    _sizes: tuple[int, int, int] = (0, 0, 0)

    def attach(self) -> StepClock:
        """Wrap the engine's methods. The inner of two nested phases is taken off the outer."""
        engine = self.llm.engine
        self._wrap(engine.scheduler, "schedule", "schedule")
        self._wrap(engine.scheduler.running.seats, "build", "prepare", inside="schedule")
        self._wrap(engine.runner.backend, "compute", "execute")
        self._wrap(engine.runner.backend, "sample", "sample")
        self._wrap(engine.scheduler, "update", "update")
        self._wrap(self.llm, "_take", "output")
        self._wrap_step()
        return self

    def detach(self) -> None:
        """Take the wrappers off."""
        for owner, name in self._wrapped:
            delattr(owner, name)
        self._wrapped.clear()

    def _wrap(self, owner: object, name: str, phase: str, inside: str = "") -> None:
        plain: Callable[..., Any] = getattr(owner, name)
        spent = self._spent

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = plain(*args, **options)
            took = time.perf_counter() - began
            spent[phase] = spent.get(phase, 0.0) + took
            if inside:
                spent[inside] = spent.get(inside, 0.0) - took
            if phase == "schedule" and result is not None:
                self._note_sizes(result)
            if phase == "output" and self.rows:  # comes behind the step it belongs to
                self._end_row(took)
            return result

        setattr(owner, name, timed)
        self._wrapped.append((owner, name))

    def _wrap_step(self) -> None:
        engine = self.llm.engine
        plain = engine.step

        def step() -> Any:
            self._spent.clear()
            self._sizes = (0, 0, 0)
            began = time.perf_counter()
            outputs = plain()
            took = time.perf_counter() - began
            known = {phase: self._spent.get(phase, 0.0) for phase in PHASES}
            known["other"] = took - sum(known.values())
            if any(self._sizes) and len(self.rows) < MAX_ROWS:
                self.rows.append(StepRow(*self._sizes, took, known))
            return outputs

        setattr(engine, "step", step)  # noqa: B010 - mypy allows no assignment to a method
        self._wrapped.append((engine, "step"))

    def _note_sizes(self, scheduled: Any) -> None:
        counts = [c.num_tokens for c in scheduled.chunks]
        context = sum(c.start + c.num_tokens for c in scheduled.chunks)
        self._sizes = (counts.count(1), sum(n for n in counts if n > 1), context)

    def _end_row(self, output_s: float) -> None:
        row = self.rows[-1]
        if row.phases["output"] == 0.0:
            phases = row.phases | {"output": output_s}
            self.rows[-1] = replace(row, seconds=row.seconds + output_s, phases=phases)


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    how, results = resolved.get(StepConfig), resolved.get(ResultConfig)
    engine = resolved.get(EngineConfig)
    from quire.llm import LLM

    try:
        llm = LLM(**to_mapping(engine))
        batches = [measure(llm, how, size, engine.seed) for size in how.batch_size]
        prefills = measure_prefill(llm, how, engine.seed)
    except (ValueError, OSError) as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    print(table(batches))
    if results.output_json is not None:
        rows = [asdict(row) for rows in (*(b["rows"] for b in batches), prefills) for row in rows]
        summary = [{k: v for k, v in b.items() if k != "rows"} for b in batches]
        data = {"engine": _facts(llm), "batches": summary, "steps": rows}
        Path(results.output_json).write_text(json.dumps(data) + "\n", encoding="utf-8")
    return 0


def measure(llm: LLM, how: StepConfig, batch_size: int, seed: int) -> dict[str, Any]:
    """Median of each phase over the decode steps of a full batch, in microseconds."""
    _generate(llm, replace(how, output_len=4), batch_size, f"{seed}/{batch_size}/warm")
    clock = StepClock(llm).attach()
    try:
        _generate(llm, how, batch_size, f"{seed}/{batch_size}")
    finally:
        clock.detach()
    full = [r for r in clock.rows if r.decodes == batch_size and not r.prompt_tokens]
    if not full:
        raise ValueError(f"no step had {batch_size} sequences: raise max_num_seqs or memory")
    phases = {p: 1e6 * median(r.phases[p] for r in full) for p in PHASES}
    total = 1e6 * median(r.seconds for r in full)
    outside = [r.seconds - r.phases[MODEL_PHASE] for r in full]
    shares = [part / r.seconds for part, r in zip(outside, full, strict=True)]
    return {
        "batch_size": batch_size,
        "steps": len(full),
        "step_us": total,
        "phases_us": phases,
        "outside_model_us": 1e6 * median(outside),
        "outside_model_share": median(shares),
        "rows": clock.rows,
    }


def measure_prefill(llm: LLM, how: StepConfig, seed: int) -> list[StepRow]:
    """Steps that compute prompts of rising length, one at a time: a simulated engine's
    prefill rate is fitted to them."""
    clock = StepClock(llm).attach()
    limit = llm.engine.model.max_model_len - how.output_len
    try:
        for length in how.prefill_len:
            if length < limit:
                alone = replace(how, input_len=length, output_len=2)
                for i in range(PREFILL_REPEATS):
                    _generate(llm, alone, 1, f"{seed}/prefill/{length}/{i}")
    finally:
        clock.detach()
    return clock.rows


def table(batches: Sequence[dict[str, Any]]) -> str:
    """Microseconds by phase, for a terminal."""
    head = "".join(f"{p:>10}" for p in PHASES)
    lines = [f"{'batch':>6}{'step us':>10}{head}{'outside the model':>20}"]
    for b in batches:
        phases = "".join(f"{b['phases_us'][p]:>10.1f}" for p in PHASES)
        outside = f"{b['outside_model_us']:.0f} us, {100 * b['outside_model_share']:.1f} %"
        lines.append(f"{b['batch_size']:>6}{b['step_us']:>10.1f}{phases}{outside:>20}")
    return "\n".join(lines)


def _generate(llm: LLM, how: StepConfig, count: int, seed: str) -> None:
    from quire.api.sampling import SamplingParams

    rng = random.Random(seed)
    vocab = range(10, min(how.vocab_size, llm.engine.model.config.vocab_size))
    prompts = [rng.choices(vocab, k=how.input_len) for _ in range(count)]
    params = SamplingParams(
        temperature=how.temperature, max_tokens=how.output_len, ignore_eos=True, seed=0
    )
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def _facts(llm: LLM) -> dict[str, Any]:
    """What a simulated engine needs to know beside times."""
    engine = llm.engine
    return {
        "model": engine.config.model,
        "num_blocks": engine.pool.num_blocks,
        "block_size": engine.config.block_size,
        "block_bytes": engine.runner.backend.layout.block_bytes,
        "max_num_seqs": engine.config.max_num_seqs,
        "max_num_batched_tokens": engine.config.max_num_batched_tokens,
    }
