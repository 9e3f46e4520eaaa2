"""Every native architecture, prompts computed at one tensor-parallel degree and decoded at another,
both ways, over both transports, in fp32: the tokens of one process."""

from __future__ import annotations

import asyncio

import pytest
from parallel_models import SHARED
from test_disaggregated import ENGINE, submit
from test_disaggregated_parallel import TRANSFER, same_tokens
from test_migration import forget
from test_parity import prompt
from tiny_models import build
from workers import WorkerProcess, ask

LENGTHS = (40, 97, 200, 333)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
@pytest.mark.parametrize("tiny", SHARED, ids=lambda tiny: tiny.name)
async def test_tokens_are_those_of_one_process(tmp_path, tiny, transport) -> None:
    build(tiny, tmp_path / "model")
    options = ENGINE | {"model": str(tmp_path / "model"), "max_model_len": 512, "device": "cpu"}
    transfer = TRANSFER | {"kv_transports": [transport]}
    one, two = (
        WorkerProcess(tmp_path, f"of{n}", options | {"tensor_parallel_size": n}, transfer)
        for n in (1, 2)
    )
    alone = WorkerProcess(tmp_path, "alone", options)
    workers = (one, two, alone)
    try:
        await asyncio.gather(*(worker.ready() for worker in workers))
        ids = [prompt(i, length) for i, length in enumerate(LENGTHS)]
        want = await ask(alone, [submit(i, p) for i, p in enumerate(ids)])
        for prefill, decode in ((two, one), (one, two)):
            computed = await decode.metric("quire_step_tokens_sum")
            got = await ask(decode, [submit(i, p, prefill) for i, p in enumerate(ids)])
            same_tokens(got, want)
            answered = sum(len(tokens) for a in got for tokens in a.tokens.values())
            # the decode worker computed no prompt, only what follows the first tokens
            assert await decode.metric("quire_step_tokens_sum") - computed < answered
            await asyncio.gather(*(worker.wait_released() for worker in workers))
            await forget(*workers)
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))
