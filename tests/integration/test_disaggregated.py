"""Disaggregated output equals aggregated output, token by token, over real processes and wires."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import pytest_asyncio
from workers import WorkerProcess, ask

from quire.proto import worker_pb2

ENGINE = {
    "model": "demo",
    "kv_cache_memory_bytes": 48 << 20,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 96,
    "max_model_len": 1024,
    "num_threads": 1,
}
UCX_TLS = {"nixl over shared memory": "cma,posix,self,tcp", "nixl over tcp": "tcp"}
"""What UCX may use; by itself it takes shared memory between processes of one host."""
CELLS = [
    pytest.param((dtype, transport), id=f"{dtype}-{transport}", marks=marks)
    for transport, marks in (
        ("tcp", ()),
        ("grpc", ()),
        ("nixl", ()),
        ("nixl over tcp", pytest.mark.slow),
        ("nixl over shared memory", pytest.mark.slow),
    )
    for dtype in ("float32", "bfloat16")
]

FEATURES = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 17, "top_k": 50, "top_p": 0.95},
    "choices": {"temperature": 1.0, "seed": 3, "n": 3},
    "logprobs": {"temperature": 0.7, "seed": 5, "logprobs": 3, "n": 2},
    "penalties": {
        "temperature": 0.8, "seed": 9, "presence_penalty": 0.6, "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    "stop_ids": {"temperature": 1.0, "seed": 21, "stop_token_ids": list(range(260, 380))},
    "bias": {"temperature": 0.5, "seed": 2, "logit_bias": {300: 5.0}, "min_tokens": 6},
    "one_token": {"temperature": 1.0, "seed": 4, "max_tokens": 1, "n": 2},
}  # fmt: skip


PREFIX = 160
"""Tokens; ten blocks."""


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 8000, length).tolist()


def submit(number: int, ids: list[int], hint: WorkerProcess | None = None, **sampling):
    message = worker_pb2.Submit(
        request=number, request_id=f"r{number}", attempt=1, prompt_token_ids=ids,
        sampling={"n": 1, "max_tokens": 12, "seed": 1} | sampling,
    )  # fmt: skip
    if hint is not None:
        message.prefill.worker, message.prefill.address = hint.name, hint.address
    return message


class Trio:
    """A decode and a prefill worker, and one that does both."""

    def __init__(self, folder, dtype: str, transport: str, **options) -> None:
        self.transport = transport
        engine = ENGINE | {"dtype": dtype} | options
        ucx, (transport, *_) = UCX_TLS.get(transport), transport.split()
        # patient: on a busy machine a missed heartbeat would move the prompt to the decode worker
        transfer = {"kv_transports": [transport], "kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}
        environment = {"UCX_TLS": ucx} if ucx else {}
        self.decode = WorkerProcess(folder, "decode", engine, transfer, environment=environment)
        self.prefill = WorkerProcess(folder, "prefill", engine, transfer, environment=environment)
        self.both = WorkerProcess(folder, "both", engine)
        self.all = (self.decode, self.prefill, self.both)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=CELLS)
async def trio(request, tmp_path_factory):
    dtype, transport = request.param
    if transport.startswith("nixl"):
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    trio = Trio(tmp_path_factory.mktemp("sockets"), dtype, transport)
    try:
        await asyncio.gather(*(worker.ready() for worker in trio.all))
        yield trio
    finally:
        await asyncio.gather(*(worker.stop() for worker in trio.all))


def same(got, want) -> None:
    assert [a.failure for a in got] == [None] * len(got)
    assert [a.tokens for a in got] == [a.tokens for a in want]
    assert [a.ended for a in got] == [a.ended for a in want]
    assert [a.logprobs for a in got] == [a.logprobs for a in want]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("feature", FEATURES)
async def test_a_feature_gives_the_same_answer(trio, feature) -> None:
    sampling = FEATURES[feature]
    ids = [prompt(100 + list(FEATURES).index(feature), length) for length in (40, 96, 300)]
    computed = await trio.decode.metric("quire_step_tokens_sum")
    got = await ask(
        trio.decode, [submit(i, p, trio.prefill, **sampling) for i, p in enumerate(ids)]
    )
    want = await ask(trio.both, [submit(i, p, **sampling) for i, p in enumerate(ids)])
    same(got, want)
    answered = sum(len(t) for a in got for t in a.tokens.values())
    # the decode worker computed no prompt, only what follows the first tokens
    assert await trio.decode.metric("quire_step_tokens_sum") - computed < answered
    for worker in (trio.decode, trio.prefill):
        await worker.wait_released()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("where", ["decode", "prefill", "both"])
async def test_a_cached_prefix_gives_the_same_answer(trio, where) -> None:
    prefix = prompt({"decode": 71, "prefill": 72, "both": 73}[where], PREFIX)
    full = prefix + prompt(5, 100)
    for worker in (trio.decode, trio.prefill) if where == "both" else (getattr(trio, where),):
        await ask(worker, [submit(1, prefix, max_tokens=1)])
    sampling = {"temperature": 0.8, "seed": 8, "n": 2}
    computed = await trio.prefill.metric("quire_step_tokens_sum")
    hits = await trio.prefill.metric("quire_prefix_cache_hits_total")
    sent = await trio.prefill.metric("quire_kv_transfer_blocks_total")
    [got] = await ask(trio.decode, [submit(1, full, trio.prefill, **sampling)])
    same([got], await ask(trio.both, [submit(1, full, **sampling)]))

    on_decode = PREFIX if where != "prefill" else 0
    on_prefill = PREFIX if where != "decode" else 0
    admission = got.admission
    assert not admission.remote.failed
    assert (admission.cached_tokens, admission.remote.cached_tokens) == (on_decode, on_prefill)
    assert await trio.prefill.metric("quire_prefix_cache_hits_total") - hits == on_prefill
    # what it had not cached it computed, and only what the other one had not cached was sent
    assert await trio.prefill.metric("quire_step_tokens_sum") - computed == len(full) - on_prefill
    blocks = -(-(len(full) - on_decode) // 16)
    assert await trio.prefill.metric("quire_kv_transfer_blocks_total") - sent == blocks
    for worker in (trio.decode, trio.prefill):
        await worker.wait_released()


@pytest.mark.asyncio(loop_scope="module")
async def test_many_at_once_give_the_same_answers(trio) -> None:
    def batch(hint):
        return [
            submit(i, prompt(i, 20 + 37 * i % 400), hint, temperature=0.9, seed=i, n=1 + i % 2)
            for i in range(24)
        ]

    got, want = await asyncio.gather(
        ask(trio.decode, batch(trio.prefill)), ask(trio.both, batch(None))
    )
    same(got, want)
    for worker in (trio.decode, trio.prefill):
        await worker.wait_released()


@pytest.mark.asyncio(loop_scope="module")
async def test_one_sided_writes_take_the_way_that_ucx_was_told(trio) -> None:
    if trio.transport not in UCX_TLS:
        pytest.skip("UCX is not told")
    [answer] = await ask(trio.decode, [submit(1, prompt(9, 200), trio.prefill)])
    assert not answer.admission.remote.failed
    for worker in (trio.decode, trio.prefill):
        assert worker.shares_memory() == (trio.transport == "nixl over shared memory")


@pytest.mark.asyncio(loop_scope="module")
async def test_rounded_weights_give_the_same_answers(tmp_path_factory) -> None:
    """All three round the same weights, so their blocks have one fingerprint."""
    folder = tmp_path_factory.mktemp("sockets")
    trio = Trio(folder, "bfloat16", "tcp", quantization="int4")
    try:
        await asyncio.gather(*(worker.ready() for worker in trio.all))
        sampling = {"temperature": 0.8, "seed": 11, "n": 2}
        ids = [prompt(seed, length) for seed, length in ((201, 40), (202, 250))]
        computed = await trio.decode.metric("quire_step_tokens_sum")
        got = await ask(
            trio.decode, [submit(i, p, trio.prefill, **sampling) for i, p in enumerate(ids)]
        )
        same(got, await ask(trio.both, [submit(i, p, **sampling) for i, p in enumerate(ids)]))
        answered = sum(len(t) for a in got for t in a.tokens.values())
        assert await trio.decode.metric("quire_step_tokens_sum") - computed < answered
    finally:
        await asyncio.gather(*(worker.stop() for worker in trio.all))
