"""`LLM`: text is made when it is wanted, at the end or for a stop string, and is the same."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams
from quire.text.output import ChoiceText, End

PROMPT = "import os\n\ndef "


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", max_num_seqs=4, kv_cache_memory_bytes="8M", max_model_len=256)


def generate(llm: LLM, **params):
    return llm.generate(PROMPT, SamplingParams(seed=3, **params), use_tqdm=False)[0]


def test_text_and_scores_at_the_end_are_those_of_token_by_token(llm) -> None:
    answer = generate(llm, max_tokens=24, n=2, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    for choice in answer.outputs:
        params = SamplingParams(n=2, logprobs=1)
        text = ChoiceText(llm.get_tokenizer(), params)
        for token in choice.token_ids[:-1]:
            text.push([token])
        text.push(choice.token_ids[-1:], (), End("length"))
        assert choice.text == text.text
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == len(choice.logprobs) == 24
        scores = [s[t].logprob for t, s in zip(choice.token_ids, choice.logprobs, strict=True)]
        assert choice.cumulative_logprob == pytest.approx(sum(scores))
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)


def test_a_stop_string_ends_a_choice_in_the_step_that_completes_it(llm) -> None:
    [free] = generate(llm, max_tokens=40, temperature=0, ignore_eos=True).outputs
    stop = free.text[10:13]
    steps = llm.engine.scheduler.counters.steps
    answer = generate(llm, max_tokens=40, temperature=0, ignore_eos=True, stop=[stop], logprobs=0)
    [choice] = answer.outputs
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.text == free.text[: free.text.index(stop)]
    assert choice.token_ids == free.token_ids[: len(choice.token_ids)]
    assert len(choice.logprobs) == len(choice.token_ids) < 40
    assert llm.engine.scheduler.counters.steps - steps == len(choice.token_ids)
    assert not llm.engine.has_work
