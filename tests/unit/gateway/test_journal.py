"""A token is taken in once, in order, and only from the current attempt."""

from __future__ import annotations

import itertools
import random

import pytest

from quire.gateway.journal import Journal, Verdict
from quire.proto import common_pb2
from quire.proto.worker_pb2 import ChoiceOutput, Submit

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


def journal(n=1, **fields):
    submit = Submit(**fields)
    submit.sampling.n = n
    return Journal(submit)


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"position": 2}, Verdict.ACCEPT),
        ({"position": 1}, Verdict.STALE),
        ({"position": 3}, Verdict.GAP),
        ({"position": 2, "attempt": 1}, Verdict.STALE),
        ({"position": 0, "choice": 1}, Verdict.STALE),
    ],
)
def test_verdicts(fields, verdict):
    record = journal()
    record.take(ChoiceOutput(token_ids=[7, 8]))
    assert record.judge(ChoiceOutput(token_ids=[9], **fields)) is verdict


def test_attempt_is_the_gateways_to_raise():
    record = journal()
    record.attempt = 1
    assert record.judge(ChoiceOutput(attempt=0)) is Verdict.STALE
    assert record.judge(ChoiceOutput(attempt=1)) is Verdict.ACCEPT


def test_ended_choices_are_not_asked_for_again():
    record = journal(n=3, prompt_token_ids=[1, 2])
    record.take(ChoiceOutput(choice=1, token_ids=[4, 5]))
    record.take(ChoiceOutput(choice=0, token_ids=[6], finish_reason=LENGTH))
    record.attempt = 1
    again = record.message()
    assert again.attempt == 1
    assert list(again.prompt_token_ids) == [1, 2]
    assert {r.choice: list(r.token_ids) for r in again.resumed} == {1: [4, 5], 2: []}
    assert record.judge(ChoiceOutput(attempt=1, choice=1, position=2)) is Verdict.ACCEPT
    assert record.judge(ChoiceOutput(attempt=1, choice=0, position=1)) is Verdict.STALE


def test_a_request_without_an_answer_is_sent_as_it_was_first():
    record = journal(n=2, prompt_token_ids=[1])
    record.attempt = 2
    again = record.message()
    assert (again.attempt, len(again.resumed)) == (2, 0)


def test_what_is_left_of_the_deadline_is_passed_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("quire.gateway.journal.time.monotonic", lambda: now[0])
    record = journal(timeout_ms=5000)
    now[0] += 2
    assert record.message().timeout_ms == 3000


def test_a_prompts_scores_are_taken_once():
    submit = Submit(prompt_token_ids=[1, 2])
    submit.sampling.n = 1
    submit.sampling.prompt_logprobs = 1
    record = Journal(submit)
    assert record.message().sampling.HasField("prompt_logprobs")
    first = ChoiceOutput(token_ids=[5])
    first.admission.cached_tokens = 3
    first.prompt_logprobs.add(logprob=-1)
    record.take(first)
    assert first.HasField("admission")
    assert not record.message().sampling.HasField("prompt_logprobs")
    again = ChoiceOutput(position=1, token_ids=[6])
    again.admission.cached_tokens = 4
    record.take(again)
    assert not again.HasField("admission")


@pytest.mark.parametrize(
    ("tokens", "ignore_eos", "end"),
    [([5, 6, 7], False, LENGTH), ([5, 9], False, STOP), ([5, 8], False, STOP), ([5, 9], True, None),
     ([5, 8], True, STOP), ([5, 6], False, None), ([], False, None)],
)  # fmt: skip
def test_an_end_that_was_not_said_is_known(tokens, ignore_eos, end):
    submit = Submit()
    submit.sampling.n, submit.sampling.max_tokens = 1, 3
    submit.sampling.stop_token_ids.append(8)
    submit.sampling.ignore_eos = ignore_eos
    record = Journal(submit)
    record.take(ChoiceOutput(token_ids=tokens))
    endings = record.endings(eos_token_ids=(9,))
    assert [e.finish_reason for e in endings] == ([] if end is None else [end])


def test_repeated_and_reordered_batches_give_each_token_once():
    rng = random.Random(0)
    for _ in range(50):
        tokens = list(range(rng.randrange(1, 30)))
        cuts = sorted({0, len(tokens), *(rng.randrange(len(tokens)) for _ in range(4))})
        batches = [(low, tokens[low:high]) for low, high in itertools.pairwise(cuts)]
        record = journal()
        while len(record.emitted[0]) < len(tokens):
            position, ids = rng.choice(batches)
            if record.judge(ChoiceOutput(position=position, token_ids=ids)) is Verdict.ACCEPT:
                record.take(ChoiceOutput(token_ids=ids))
        assert record.emitted[0] == tokens
