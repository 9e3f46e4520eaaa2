"""A token is taken in once, in order, and only from the current attempt."""

from __future__ import annotations

import itertools
import random

import pytest

from quire.gateway.journal import Journal, Verdict
from quire.proto.worker_pb2 import ChoiceOutput, Submit


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
    record.append(0, [7, 8])
    assert record.judge(ChoiceOutput(token_ids=[9], **fields)) is verdict


def test_attempt_is_the_gateways_to_raise():
    record = journal()
    record.attempt = 1
    assert record.judge(ChoiceOutput(attempt=0)) is Verdict.STALE
    assert record.judge(ChoiceOutput(attempt=1)) is Verdict.ACCEPT


def test_resubmission_goes_on_behind_what_was_emitted():
    record = journal(n=2)
    record.append(1, [4, 5])
    again = Submit(attempt=1)
    again.sampling.n = 2
    for ids in record.emitted:
        again.emitted.add(ids=ids)
    resumed = Journal(again)
    assert resumed.emitted == [[], [4, 5]]
    assert resumed.judge(ChoiceOutput(attempt=1, choice=1, position=2)) is Verdict.ACCEPT


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
                record.append(0, ids)
        assert record.emitted[0] == tokens
