"""Parity with transformers for every native architecture, on tiny random weights.

fp32: logits within float tolerance and greedy tokens equal, alone, batched, chunked, with a prefix
hit and after preemption. bf16: our own logits are the same bits across all of these.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engines import Collector
from tiny_models import TINY, VOCAB, build, read_back

from quire.api.sampling import SamplingParams
from quire.config.engine import EngineConfig
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.kernels.ops import StepInputs

if TYPE_CHECKING:
    from pathlib import Path

IDS = [tiny.name for tiny in TINY]
NEW_TOKENS = 12
LENGTHS = (15, 31, 47, 90)
"""Prompts that together fill 12 blocks, so that the first growth in a pool of 12 preempts."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(folder, transformers model in fp32) of an architecture, by index and dtype."""

    @cache
    def get(index: int, dtype: str):
        folder = tmp_path_factory.mktemp("model")
        return folder, build(TINY[index], folder, dtype)

    return get


def load(folder: Path, **options) -> Engine:
    config = EngineConfig(
        model=str(folder),
        **{"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8, "device": "cpu"} | options,
    )
    return Engine.load(config, lambda _: None)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def request(number: int, ids: list[int], max_tokens: int = NEW_TOKENS, **params) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)
    return EngineRequest(request_id=str(number), prompt_token_ids=ids, params=params, seed=number)


def generate(engine: Engine, requests: list[EngineRequest]):
    """Greedy tokens per request, and the logits each token was drawn from."""
    logits = {}
    sampler = engine.runner.backend.sampler

    def recording(batch):
        sample = sampler(batch)
        return lambda rows: record(sample, rows, batch)

    def record(sample, rows, batch):
        for i, row in enumerate(batch.rows.tolist()):
            key = (int(batch.rules["seed"][i]), int(batch.position[i]))
            logits[key] = torch.as_tensor(rows[row]).float().clone()
        return sample(rows)

    engine.runner.backend.sampler = recording
    try:
        for entry in requests:
            engine.add_request(entry)
        collector = Collector()
        while engine.has_work:
            collector.take(engine.step())
            engine.pool.check_integrity()
    finally:
        engine.runner.backend.sampler = sampler
    return {int(key[0]): tokens for key, tokens in collector.tokens.items()}, logits


def reference_tokens(model, ids: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, eos_token_id=None,
            do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, len(ids)),
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def whole_prompt(ids: list[int], num_blocks: int) -> StepInputs:
    """All rows of one prompt, logits wanted for all."""
    rows = np.arange(len(ids), dtype=np.int32)
    return StepInputs(
        token_ids=np.array(ids, np.int32),
        positions=rows,
        query_start=np.array([0, len(ids)], np.int32),
        context_lens=np.array([len(ids)], np.int32),
        block_tables=np.arange(-(-len(ids) // 16), dtype=np.int32)[None],
        logit_rows=rows,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("index", range(len(TINY)), ids=IDS)
def test_logits_are_as_close_to_the_truth_as_transformers_own(checkpoint, index, dtype) -> None:
    """The truth is the checkpoint computed in fp32; in a narrower dtype both round, we no worse."""
    folder, model = checkpoint(index, dtype)
    engine = load(folder, max_num_batched_tokens=128, max_num_seqs=80)
    ids = prompt(1, 101)
    ours = torch.as_tensor(engine.runner.backend.compute(whole_prompt(ids, 8))).float()
    with torch.no_grad():
        truth = model(torch.tensor([ids])).logits[0]
        if dtype == "float32":
            allowed = 2e-4 * truth.std()
        else:
            theirs = read_back(TINY[index], folder, dtype)
            allowed = 1.1 * rms(theirs(torch.tensor([ids])).logits[0].float() - truth)
    assert ours.shape == truth.shape
    assert rms(ours - truth) < allowed


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("index", range(len(TINY)), ids=IDS)
def test_greedy_tokens_equal_transformers_in_every_way_to_get_there(checkpoint, index) -> None:
    folder, model = checkpoint(index, "float32")
    prompts = {i: prompt(i, length) for i, length in enumerate(LENGTHS, start=1)}
    want = {i: reference_tokens(model, ids) for i, ids in prompts.items()}
    requests = [request(i, ids) for i, ids in prompts.items()]

    for ahead in (False, True):
        batched = load(folder, async_scheduling=ahead)
        assert generate(batched, requests)[0] == want, "batched"
        assert generate(batched, requests)[0] == want, "with a prefix hit"
        assert batched.scheduler.counters.cache_hits > 100
    eager = load(folder, async_scheduling=True, enforce_eager=True)
    assert generate(eager, requests)[0] == want, "operation by operation"
    alone = load(folder)
    for entry in requests:
        number = int(entry.request_id)
        assert generate(alone, [entry])[0] == {number: want[number]}, "alone"
    chunked = load(folder, max_num_batched_tokens=8, max_num_seqs=5)
    assert generate(chunked, requests)[0] == want, "chunked"
    block_bytes = chunked.runner.backend.layout.block_bytes
    tight = load(folder, kv_cache_memory_bytes=12 * block_bytes, max_model_len=110)
    assert generate(tight, requests)[0] == want, "preempted"
    assert tight.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("index", range(len(TINY)), ids=IDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_the_same_bits_in_every_way_to_get_there(checkpoint, index, dtype) -> None:
    folder, _ = checkpoint(index, dtype)
    prompts = {i: prompt(i, length) for i, length in enumerate(LENGTHS, start=1)}
    requests = [request(i, ids) for i, ids in prompts.items()]
    alone = load(folder, enable_prefix_caching=False)
    assert alone.runner.backend.is_batch_invariant
    want = {}
    for entry in requests:
        want |= generate(alone, [entry])[1]

    def check(engine: Engine, how: str) -> None:
        _, got = generate(engine, requests)
        assert got.keys() == want.keys()
        for key, logits in got.items():
            assert torch.equal(logits, want[key]), f"{how}: request {key[0]}, position {key[1]}"

    batched = load(folder)
    check(batched, "batched")
    check(batched, "prefix hit")
    small = {"max_num_batched_tokens": 8, "max_num_seqs": 5}
    block_bytes = alone.runner.backend.layout.block_bytes
    few = {"kv_cache_memory_bytes": 12 * block_bytes, "max_model_len": 110}
    for ahead in (False, True):
        check(load(folder, async_scheduling=ahead, **small), f"chunked, {ahead=}")
        tight = load(folder, async_scheduling=ahead, **few)
        check(tight, f"preempted, {ahead=}")
        assert tight.scheduler.counters.preemptions > 0
    check(load(folder, num_threads=1), "one thread")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_prompt_logprobs_equal_transformers(checkpoint, ahead, eager) -> None:
    folder, model = checkpoint(0, "float32")
    ids = prompt(3, 70)
    how = {"async_scheduling": ahead, "enforce_eager": eager}
    engine = load(folder, max_num_batched_tokens=16, max_num_seqs=8, **how)
    engine.add_request(request(1, ids, prompt_logprobs=3, logprobs=2))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = outputs[0].prompt_logprobs
    assert len(entries) == len(ids) - 1
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(log_probs[i, ids[i + 1]]), abs=1e-3)
        top = log_probs[i].topk(3)
        assert entry.top_ids == top.indices.tolist()
        assert entry.rank == 1 + int((log_probs[i] > log_probs[i, ids[i + 1]]).sum())
    first = outputs[0].logprobs[0]
    assert first.rank == 1
    assert first.logprob == pytest.approx(float(log_probs[-1].max()), abs=1e-3)


def test_weights_that_are_missing_or_left_over_are_refused(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint(0, "float32")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors .* model\.extra\.weight"):
        load(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'model\.norm\.weight'"):
        load(tmp_path)


def test_a_context_that_cannot_fit_says_what_would(checkpoint) -> None:
    folder, _ = checkpoint(0, "float32")
    with pytest.raises(ValueError, match="use --max-model-len 224 or less, or give"):
        load(folder, kv_cache_memory_bytes=14 * 3 * 3 * 2 * 16 * 32 * 4)
