"""Hugging Face transformers on the same requests: padded batches, and continuous batching."""

from __future__ import annotations

import time
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

from quire import demo
from quire.cli.bench.throughput import Measurement
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.cli.bench.datasets import Sample
    from quire.cli.bench.options import ThroughputConfig
    from quire.config.engine import EngineConfig


WAYS = ("padded", "continuous")


def measure_transformers(
    engine: EngineConfig,
    how: ThroughputConfig,
    samples: Sequence[Sample],
    ways: Sequence[str] = WAYS,
) -> list[Measurement]:
    """Its ways on these requests. Raises ConfigError when it cannot run them."""
    prompts = [s.prompt for s in samples]
    if any(isinstance(p, str) for p in prompts):
        raise ConfigError("the transformers backend needs a dataset of token ids, such as random")
    model = _load(engine)
    ids: list[list[int]] = [p for p in prompts if not isinstance(p, str)]
    lengths = [s.output_len for s in samples]
    size = how.hf_max_batch_size
    measured = []
    _padded(model, ids[:2], [2], size)
    known: dict[str, tuple[str, Callable[[], int]]] = {
        "padded": (
            f"transformers (padded, {size})",
            lambda: _padded(model, ids, lengths, size),
        ),
        "continuous": ("transformers (continuous)", lambda: _continuous(model, ids, lengths)),
    }
    for name, generate in (known[way] for way in ways):
        times, made = [], 0
        for _ in range(how.num_repeats):
            began = time.perf_counter()
            made = generate()
            times.append(time.perf_counter() - began)
        total = sum(map(len, ids))
        measured.append(Measurement(name, median(times), len(ids), total, made))
    return measured


def _load(engine: EngineConfig) -> Any:
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"the transformers backend needs transformers: {error}") from None
    import torch

    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        demo.path() if engine.model == "demo" else engine.model,
        revision=engine.revision or "main", dtype=engine.dtype, attn_implementation="sdpa",
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


def _padded(model: Any, prompts: list[list[int]], lengths: list[int], size: int) -> int:
    """Left-padded batches; each runs to its longest output. Counts the tokens asked for."""
    import torch

    for start in range(0, len(prompts), size):
        batch, wanted = prompts[start : start + size], max(lengths[start : start + size])
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=wanted, min_new_tokens=wanted,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return sum(lengths)


def _continuous(model: Any, prompts: list[list[int]], lengths: list[int]) -> int:
    """Its paged engine, which has one output length for all: the mean. Counts what it made."""
    transformers: Any = import_module("transformers")
    mean = max(1, round(sum(lengths) / len(lengths)))
    config = transformers.GenerationConfig(
        max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    return sum(len(output.generated_tokens) for output in outputs.values())
