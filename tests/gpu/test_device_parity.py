"""On a GPU: the CUDA path against transformers, with and without graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_parity import LENGTHS, generate, load, prompt, reference_tokens, request
from tiny_models import TINY, build

from quire.api.sampling import SamplingParams
from quire.engine.runner.cuda import CudaBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
PROMPTS = {i: prompt(i, length) for i, length in enumerate(LENGTHS, start=1)}


def load_cuda(folder, **options):
    return load(folder, **{"device": "cuda"} | options)


@pytest.fixture(params=TINY, ids=lambda tiny: tiny.name)
def checkpoint(request, tmp_path):
    return tmp_path, build(request.param, tmp_path)


def test_greedy_tokens_equal_transformers_with_graphs_and_without(checkpoint) -> None:
    """In float32, without TF32: what remains is the order of sums."""
    folder, model = checkpoint
    want = {i: reference_tokens(model, ids) for i, ids in PROMPTS.items()}
    requests = [request(i, ids) for i, ids in PROMPTS.items()]
    for options in ({}, {"enforce_eager": True}):
        engine = load_cuda(folder, **options)
        assert isinstance(engine.runner.backend, CudaBackend) != bool(options)
        assert generate(engine, requests)[0] == want, "batched"
        assert generate(engine, requests)[0] == want, "with a prefix hit"
        for entry in requests:
            number = int(entry.request_id)
            assert generate(engine, [entry])[0] == {number: want[number]}, "alone"
        chunked = load_cuda(folder, max_num_batched_tokens=8, max_num_seqs=5, **options)
        assert generate(chunked, requests)[0] == want, "chunked"
        size = 12 * chunked.runner.backend.layout.block_bytes
        tight = load_cuda(folder, kv_cache_memory_bytes=size, max_model_len=110, **options)
        assert generate(tight, requests)[0] == want, "preempted"
        assert tight.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_in_narrow_types_are_close_to_those_of_the_cpu(checkpoint, dtype) -> None:
    folder, _ = checkpoint
    requests = [request(i, ids) for i, ids in PROMPTS.items()]
    _, ours = generate(load_cuda(folder, dtype=dtype), requests)
    _, cpu = generate(load(folder, dtype=dtype), requests)
    first = {key for key in cpu if key[1] == len(PROMPTS[key[0]])}
    for key in first:  # later ones follow tokens that may differ
        scale = float(cpu[key].std())
        assert float((ours[key].cpu() - cpu[key]).abs().max()) < 0.1 * scale


def test_sampled_tokens_are_those_of_the_cpu(tmp_path) -> None:
    """Float32 logits of two devices differ in the last bits only: the same noise decides."""
    build(TINY[0], tmp_path)
    warm = SamplingParams(temperature=0.8, max_tokens=12, ignore_eos=True)
    requests = [replace(request(i, ids), params=warm) for i, ids in PROMPTS.items()]
    want, _ = generate(load(tmp_path), requests)
    assert generate(load_cuda(tmp_path), requests)[0] == want
