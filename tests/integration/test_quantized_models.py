"""Quantized models whole: the logits of the floats that their integers stand for, in every format.

In float32 what is left between the two is the rounding of activations to fixed point.
"""

from __future__ import annotations

import inspect
import textwrap
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from parallel_models import SHARED
from quantized_checkpoints import KINDS, convert
from test_parity import LENGTHS, generate, load, prompt, request, rms, whole_prompt
from test_tensor_parallel import in_threads
from tiny_models import Tiny, build

from quire import LLM, SamplingParams
from quire.config.engine import EngineConfig
from quire.engine.runner.load import find_model, loaded_model

if TYPE_CHECKING:
    from pathlib import Path
from types import SimpleNamespace

WIDE = Tiny("wide", "Llama", {
    "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 128})  # fmt: skip
"""o and down can be cut between groups of 128 columns, for 4 ranks."""
MODELS = {tiny.name: tiny for tiny in [*SHARED, WIDE]}
FIXED_POINT = 2e-3
"""Of the logits' deviation: three layers of activations rounded to 2^-16 of a block's largest."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """(integers, floats): the folders of a format and model, by name."""

    @cache
    def get(kind_name: str, model: str = "llama-gqa3"):
        folder = tmp_path_factory.mktemp("quantized")
        build(MODELS[model], folder / "source")
        kind = next(kind for kind in KINDS if kind.name == kind_name)
        convert(folder / "source", kind, folder / "integers", folder / "floats")
        return folder / "integers", folder / "floats"

    return get


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A float checkpoint, by name of the model."""

    @cache
    def get(model: str, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("source")
        build(MODELS[model], folder, dtype)
        return folder

    return get


def logits(folder: Path, **options) -> torch.Tensor:
    backend = load(folder, max_num_batched_tokens=128, max_num_seqs=80, **options).runner.backend
    return torch.as_tensor(backend.compute(whole_prompt(prompt(1, 101), 8))).float().clone()


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_logits_are_those_of_the_floats(checkpoints, name) -> None:
    integers, floats = checkpoints(name)
    want = logits(floats)
    assert rms(logits(integers) - want) < FIXED_POINT * want.std()
    eager = logits(integers, enforce_eager=True)
    assert rms(eager - want) < 1e-4 * want.std()


@pytest.mark.parametrize("model", ["qwen2-bias-tied", "llama-linear-rope-bias", "qwen3-qknorm"])
def test_families_with_biases_and_norms(checkpoints, model) -> None:
    integers, floats = checkpoints("awq4", model)
    want = logits(floats)
    assert rms(logits(integers) - want) < FIXED_POINT * want.std()


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", ["llama-gqa3", "qwen2-bias-tied"])
def test_rounding_while_loading(source, method, dtype, model) -> None:
    folder = source(model)
    want, found = logits(folder), logits(folder, quantization=method, dtype=dtype)
    assert rms(found - want) < {"int8": 0.08, "int4": 1.0}[method] * want.std()
    eager = logits(folder, quantization=method, dtype=dtype, enforce_eager=True)
    assert rms(found - eager) < {"float32": FIXED_POINT}.get(dtype, 0.05) * want.std()


def requests():
    return [request(i, prompt(i, length)) for i, length in enumerate(LENGTHS, start=1)]


@pytest.mark.parametrize("name", ["gptq4-desc_act", "compressed4-asymmetric", "int8"])
def test_logits_have_the_same_bits_in_every_way_to_get_there(checkpoints, source, name) -> None:
    options = {"dtype": "bfloat16"}
    if name == "int8":
        folder, options["quantization"] = source("llama-gqa3"), name
    else:
        folder, _ = checkpoints(name)
    engine = load(folder, **options)
    want_tokens, want = generate(engine, requests())

    def check(how: str, **changes) -> None:
        tokens, found = generate(load(folder, **options | changes), requests())
        assert tokens == want_tokens, how
        assert all(torch.equal(found[key], want[key]) for key in want), how

    for one in requests():
        alone = generate(engine, [one])[1]
        assert all(torch.equal(alone[key], want[key]) for key in alone), "alone, with a prefix hit"
    check("chunked", max_num_batched_tokens=8, max_num_seqs=5)
    check("one thread", num_threads=1)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["awq4", "compressed8-row", "int4"])
def test_tokens_are_the_same_at_any_degree(checkpoints, source, name, degree) -> None:
    options = {}
    if name == "int4":
        folder, options["quantization"] = source("wide"), name
    else:
        folder, _ = checkpoints(name, "wide")
    engine = in_threads(folder, degree, **options)
    assert generate(engine, requests())[0] == generate(load(folder, **options), requests())[0]
    engine.close_ranks()


def test_the_fingerprint_tells_quantizations_apart(source) -> None:
    """So that a block computed with rounded weights is never taken for one with exact ones."""
    prints = {}
    for method in (None, "int8", "int4"):
        choice = find_model(EngineConfig(model=str(source("llama-gqa3")), quantization=method))
        prints[method] = loaded_model(choice, _NoRank()).fingerprint
    assert len(set(prints.values())) == 3


class _NoRank:
    device = numerics = None
    runner = SimpleNamespace(backend=SimpleNamespace(returns_early=False))


def test_a_format_that_the_checkpoint_has_not_is_refused(source) -> None:
    with pytest.raises(ValueError, match="--quantization awq: the checkpoint is in floats"):
        load(source("llama-gqa3"), quantization="awq")


def test_dummy_weights_of_a_quantized_config(checkpoints) -> None:
    integers, _ = checkpoints("gptq4")
    engine = load(integers, load_format="dummy")
    assert all(row.isfinite().all() for row in generate(engine, requests())[1].values())


CODE = inspect.getsource(textwrap)[:1500]
"""What the demo model was trained on."""


@pytest.mark.parametrize(("method", "loss"), [("int8", 0.01), ("int4", 0.3)])
def test_the_demo_model_predicts_as_well(method, loss) -> None:
    """Nats per token, of about 2."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def nats(quantization: str | None) -> float:
        llm = LLM("demo", quantization=quantization, max_model_len=1024, **SMALL)
        found = llm.generate([CODE], params, use_tqdm=False)[0]
        pairs = zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True)
        return -np.mean([logprobs[token].logprob for token, logprobs in pairs])

    assert nats(method) - nats(None) < loss


SMALL = {"kv_cache_memory_bytes": 32 << 20}
