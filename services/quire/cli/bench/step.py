"""`quire bench step`: where the time of a step goes, inside the model and around it.

    schedule   which tokens, which blocks              execute   the model
    prepare    the step's arrays                       sample    drawing tokens
    update     tokens to sequences, blocks to cache    output    text for the caller
    wait       for the step to be complete             other     the rest of the loop

A step's time is from the end of the one before to its own. With --async-scheduling `execute` and
`sample` go on beside the other phases; what the model does not take of a step's time is outside it
either way. Phases are timed by wrapping the engine's own methods, which costs about a microsecond
each; the model on a GPU by events on its stream.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quire.cli.bench.options import ResultConfig, StepConfig
from quire.config.base import to_mapping
from quire.config.engine import EngineConfig
from quire.config.flags import Command, UsageError, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quire.llm import LLM

COMMAND = Command(
    prog="quire bench step",
    summary="Measure what a step costs inside the model and around it, by batch size.",
    owners=(EngineConfig, StepConfig, ResultConfig),
    positional="model",
)
PHASES = ("schedule", "prepare", "execute", "sample", "wait", "update", "output", "other")
MODEL_PHASE = "execute"
MAX_ROWS = 10_000
PREFILL_REPEATS = 3

Method = Callable[..., Any]


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


class StepClock:
    """Times the phases of an engine's steps until `detach`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.rows: list[StepRow] = []
        self._spent: dict[str, float] = {}
        self._here = 0.0
        """Of that, on the engine's thread."""
        self._since: float | None = None
        """When the last step ended, or the engine's work began; None while it is idle."""
        self._sizes: tuple[int, int, int] | None = None
        """Of the step that has just finished."""
        self._wrapped: list[tuple[object, str]] = []
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Begin and end of the model, of the steps under way on a GPU."""

    def attach(self) -> StepClock:
        """Wrap the engine's methods. The inner of two nested phases is taken off the outer."""
        engine = self.llm.engine
        backend = engine.runner.backend
        self._wrap(engine.scheduler, "schedule", self._timed("schedule"))
        self._wrap(engine.scheduler.running.seats, "build", self._timed("prepare", "schedule"))
        on_device = backend.device_type == "cuda"
        self._wrap(backend, "compute", self._marked if on_device else self._timed("execute"))
        self._wrap(backend, "sampler", self._timed_sampler)
        self._wrap(engine.runner, "launch", self._timed_wait)
        self._wrap(engine.scheduler, "update", self._timed_update)
        self._wrap(self.llm, "_take", self._timed("output"))
        self._wrap(engine, "step", self._timed_step)
        return self

    def detach(self) -> None:
        """Take the wrappers off."""
        for owner, name in self._wrapped:
            delattr(owner, name)
        self._wrapped.clear()

    def _wrap(self, owner: object, name: str, wrapper: Callable[[Method], Method]) -> None:
        setattr(owner, name, wrapper(getattr(owner, name)))
        self._wrapped.append((owner, name))

    def _timed(self, phase: str, outer: str = "") -> Callable[[Method], Method]:
        engine_thread = threading.get_ident()

        def wrapper(plain: Method) -> Method:
            def timed(*args: Any, **options: Any) -> Any:
                began = time.perf_counter()
                result = plain(*args, **options)
                took = time.perf_counter() - began
                self._spent[phase] = self._spent.get(phase, 0.0) + took
                if outer:
                    self._spent[outer] = self._spent.get(outer, 0.0) - took
                elif threading.get_ident() == engine_thread:
                    self._here += took
                return result

            return timed

        return wrapper

    def _timed_wait(self, launch: Method) -> Method:
        return lambda plan: self._timed("wait")(launch(plan))

    def _timed_sampler(self, plain: Method) -> Method:
        timed = self._timed("sample")
        return lambda batch: timed(timed(plain)(batch))

    def _timed_update(self, plain: Method) -> Method:
        timed = self._timed("update")(plain)

        def update(scheduled: Any, result: Any) -> Any:
            decodes, plan = scheduled.num_decodes, scheduled.plan
            context = sum(plan.inputs.context_lens.tolist())
            self._sizes = (decodes, plan.num_tokens - decodes, context)
            if self._marks:
                begin, end = self._marks.popleft()
                self._spent[MODEL_PHASE] = begin.elapsed_time(end) / 1e3
            return timed(scheduled, result)

        return update

    def _marked(self, plain: Method) -> Method:
        import torch

        def compute(inputs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            logits = plain(inputs)
            end.record()
            self._marks.append((begin, end))
            return logits

        return compute

    def _timed_step(self, plain: Method) -> Method:
        engine = self.llm.engine

        def step() -> Any:
            if self._since is None:
                self._since = time.perf_counter()
                self._clear()
            outputs = plain()
            if self._sizes is not None:
                self._end_row(self._sizes, self._since)
            if not engine.has_work:
                self._since = None
            return outputs

        return step

    def _end_row(self, sizes: tuple[int, int, int], since: float) -> None:
        self._since = time.perf_counter()
        took = self._since - since
        phases = {phase: self._spent.get(phase, 0.0) for phase in PHASES}
        phases["other"] = took - self._here
        if len(self.rows) < MAX_ROWS:
            self.rows.append(StepRow(*sizes, took, phases))
        self._clear()

    def _clear(self) -> None:
        self._spent.clear()
        self._here, self._sizes = 0.0, None


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
