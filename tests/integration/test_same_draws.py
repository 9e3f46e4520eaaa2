"""What is drawn depends on the request alone: its seed, choice and position."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams

PROMPTS = [
    "import os\n\ndef ",
    "class Stack:\n    def push(self, item):\n",
    "# Read a file line by line\nwith open(",
    "def test_" + "a" * 300,
]
PARAMS = [
    SamplingParams(seed=11, max_tokens=40, n=3),
    SamplingParams(seed=12, max_tokens=40, temperature=0.7, top_k=20, logprobs=2),
    SamplingParams(seed=13, max_tokens=40, top_p=0.8, min_p=0.02, presence_penalty=0.5),
    SamplingParams(
        seed=14, max_tokens=40, repetition_penalty=1.3, frequency_penalty=0.4,
        logit_bias={300: 4.0}, min_tokens=20, ignore_eos=True,
    ),
]  # fmt: skip
SMALL = {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 49152, "max_model_len": 512}


def tokens(answers):
    return [[choice.token_ids for choice in answer.outputs] for answer in answers]


@pytest.fixture(scope="module")
def alone():
    """Each request by itself, nothing cached."""
    llm = LLM("demo", **SMALL, enable_prefix_caching=False)
    return [
        tokens(llm.generate(p, s, use_tqdm=False))[0] for p, s in zip(PROMPTS, PARAMS, strict=True)
    ]


def test_in_a_batch_with_the_cache_cold_and_warm(alone) -> None:
    llm = LLM("demo", **SMALL)
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
    again = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(again) == alone
    assert again[3].num_cached_tokens > 0


def test_in_small_chunks_and_on_one_thread(alone) -> None:
    llm = LLM("demo", **SMALL | {"max_num_seqs": 6}, max_num_batched_tokens=6, num_threads=1)
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone


def test_after_preemption(alone) -> None:
    llm = LLM("demo", **SMALL | {"kv_cache_memory_bytes": 14 * 49152, "max_model_len": 224})
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
    assert llm.engine.scheduler.counters.preemptions > 0


def test_choices_differ_and_a_seed_repeats_them(alone) -> None:
    assert len({tuple(choice) for choice in alone[0]}) == 3


def test_bad_words_allowed_tokens_and_stops_hold() -> None:
    llm = LLM("demo", **SMALL)
    only = llm.generate(
        PROMPTS[0], SamplingParams(seed=1, max_tokens=30, allowed_token_ids=[300, 301, 302]),
        use_tqdm=False,
    )[0].outputs[0]  # fmt: skip
    assert set(only.token_ids) <= {300, 301, 302}
    free = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    word = llm.get_tokenizer().token_text(free[0].outputs[0].token_ids[0])
    banned = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=30, bad_words=[word]), use_tqdm=False
    )[0].outputs[0]
    assert free[0].outputs[0].text.startswith(word)
    assert not banned.text.startswith(word)
    stop = free[0].outputs[0].text[20:23]
    stopped = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=30, stop=[stop]), use_tqdm=False
    )[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stop not in stopped.text
    assert llm.engine.pool.counts().owned == 0
