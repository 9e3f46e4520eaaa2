"""The engine on random weights: time between tokens, the host's part of it, tokens per second."""

from __future__ import annotations

import gc
import math
import random
from typing import TYPE_CHECKING

import torch

from loadtest.gpu.figures import Figure
from loadtest.shapes import build, describe
from quire.cli.bench.datasets import Sample
from quire.cli.bench.hf import measure_transformers
from quire.cli.bench.options import DatasetConfig, ResultConfig, StepConfig, ThroughputConfig
from quire.cli.bench.step import measure
from quire.cli.bench.throughput import measure_quire
from quire.config.engine import EngineConfig
from quire.engine.models.llama import weight_shapes
from quire.kernels.timing import seconds
from quire.kernels.triton.tune import decode_step
from quire.llm import LLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loadtest.gpu.figures import DecodeModel, Sizes
    from quire.engine.models.config import ModelConfig

INPUT_LEN = 128
BF16_BYTES = 2


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of weights that a decode step reads, in bf16: all but an embedding that is no head."""
    shapes = weight_shapes(config)
    if not config.tie_embeddings:
        del shapes["model.embed_tokens.weight"]
    return BF16_BYTES * sum(math.prod(shape) for shape in shapes.values())


def decode(sizes: Sizes, model: DecodeModel, folder: Path, bytes_per_s: float) -> Iterator[Figure]:
    """Time between tokens against weights over bandwidth; the part of a step that is the host's."""
    longest = INPUT_LEN + sizes.decode_tokens
    llm = LLM(
        str(describe(model.shape, folder / f"{model.shape}-config")),
        load_format="dummy",
        dtype="bfloat16",
        device=sizes.device,
        max_model_len=longest,
        max_num_seqs=max(sizes.batch_sizes),
    )
    bound = weight_bytes(llm.engine.model.config) / bytes_per_s
    for batch_size in sizes.batch_sizes:
        name = f"{model.shape}, batch {batch_size}: "
        how = StepConfig(
            batch_size=(batch_size,), input_len=INPUT_LEN, output_len=sizes.decode_tokens
        )
        step_s = measure(llm, how, batch_size, seed=0)["step_us"] / 1e6
        yield Figure(name + "time between tokens", 1e3 * step_s, "ms")
        if batch_size == 1:
            wanted = f">= {model.wanted_share:g}"
            yield Figure(name + "weights over bandwidth, of it", bound / step_s, "", wanted)
        backend, inputs = llm.engine.runner.backend, decode_step([longest - 1] * batch_size)
        model_s = seconds(lambda b=backend, i=inputs: b.compute(i), torch.device(sizes.device))  # type: ignore[misc]
        yield Figure(name + "outside the model", 1 - model_s / step_s, "", "<= 0.03")
    del llm
    gc.collect()


def throughput(sizes: Sizes, folder: Path) -> Iterator[Figure]:
    """Output tokens per second beside transformers' continuous batching on uneven requests."""
    engine = EngineConfig(
        model=str(build(sizes.throughput_shape, folder / sizes.throughput_shape)),
        dtype="bfloat16",
        device=sizes.device,
        max_model_len=2 * sizes.request_lens[1],
        max_num_seqs=sizes.num_requests,
        max_num_batched_tokens=max(2048, sizes.num_requests),
    )
    rng = random.Random(0)
    samples = [_sample(rng, sizes.request_lens) for _ in range(sizes.num_requests)]
    how, dataset = ThroughputConfig(), DatasetConfig(ignore_eos=True)
    ours = measure_quire(engine, dataset, how, samples, ResultConfig(disable_tqdm=True))
    [theirs] = measure_transformers(engine, how, samples, ["continuous"])
    rates = [m.figures()["output_tokens_per_second"] for m in (ours, theirs)]
    yield Figure("output tokens per second", rates[0], "1/s")
    yield Figure("transformers, continuous batching", rates[1], "1/s")
    yield Figure("quire over transformers", rates[0] / rates[1], "x", ">= 5")


def _sample(rng: random.Random, lens: tuple[int, int]) -> Sample:
    prompt = rng.choices(range(10, 5000), k=rng.randint(*lens))
    return Sample(prompt=prompt, output_len=rng.randint(*lens))
