"""Log-probabilities of both samplers against torch's log-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quire.kernels import torch_sampler

if TYPE_CHECKING:
    from collections.abc import Callable


def torch_logprobs(logits: np.ndarray, *args: Any) -> list[np.ndarray]:
    rows, ids, num_top = args
    found = torch_sampler.logprobs(torch.from_numpy(logits), rows, torch.as_tensor(ids), num_top)
    return [x.numpy() for x in found]


@pytest.fixture(params=["torch", "cpu"])
def logprobs(request) -> Callable[..., Any]:
    if request.param == "torch":
        return torch_logprobs
    return request.getfixturevalue("cpu_samplers")[1].logprobs


@pytest.mark.parametrize("vocabulary", [5, 8200, 152_064])
def test_logprobs_are_the_log_softmax(vocabulary, logprobs) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, vocabulary)).astype(np.float32) * 4
    logits[1] = logits[1].round()
    rows, ids = np.array([0, 1, 2, 1]), np.array([0, 1, 2, 4])
    chosen, ranks, top_ids, top = logprobs(logits, rows, ids, 4)
    exact = torch.from_numpy(logits).double().log_softmax(1).numpy()
    np.testing.assert_allclose(chosen, exact[rows, ids], atol=1e-5)
    for i, row in enumerate(rows):
        order = np.lexsort((np.arange(vocabulary), -logits[row]))
        assert order[ranks[i] - 1] == ids[i]
        assert top_ids[i].tolist() == order[:4].tolist()
        np.testing.assert_allclose(top[i], exact[row, order[:4]], atol=1e-5)


def test_logprobs_of_no_top_tokens_have_no_columns(logprobs) -> None:
    logits = np.zeros((1, 9), np.float32)
    _, ranks, top_ids, top = logprobs(logits, np.zeros(1, int), np.array([3]), 0)
    assert ranks.tolist() == [4]
    assert top_ids.shape == top.shape == (1, 0)


def test_compiled_logprobs_do_not_depend_on_threads(cpu_samplers) -> None:
    logits = np.random.default_rng(2).normal(size=(2, 100_000)).astype(np.float32)
    rows, ids = np.array([1, 0]), np.array([5, 99_999])
    results = [s.logprobs(logits, rows, ids, 20) for s in cpu_samplers]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ids_outside_the_vocabulary_are_refused(cpu_samplers) -> None:
    with pytest.raises(IndexError):
        cpu_samplers[0].logprobs(np.zeros((2, 8), np.float32), np.zeros(1, int), np.array([8]), 1)
