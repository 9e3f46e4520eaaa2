"""Workers whose kernels round differently, as hosts with and without an instruction set have them:
no block goes between them, the answer is the decode worker's alone, and `quire doctor` says why."""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio
from test_disaggregated import ENGINE, prompt, same, submit
from workers import WorkerProcess, ask

from quire.cli import doctor
from quire.kernels import cpu
from quire.proto import worker_pb2

TRANSFER = {"kv_transports": ["tcp"], "kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}
ISAS = cpu.available_isas()

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(len(ISAS) < 2, reason="this machine has one instruction set"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    """A worker with this machine's best instruction set, and one with the next lower."""
    folder = tmp_path_factory.mktemp("sockets")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        for name, isa in (("best", ISAS[-1]), ("lower", ISAS[-2])):
            patch.setenv("QUIRE_CPU_ISA", isa)
            options = ENGINE | {"dtype": "bfloat16"}
            made.append(WorkerProcess(folder, name, options, TRANSFER))
    try:
        await asyncio.gather(*(worker.ready() for worker in made))
        yield made
    finally:
        await asyncio.gather(*(worker.stop() for worker in made))


def requests(hint=None):
    lengths = (40, 150, 400, 700)
    return [submit(i, prompt(i, n), hint, logprobs=2) for i, n in enumerate(lengths)]


async def forget(*workers) -> None:
    reset = worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache())
    for worker in workers:
        await worker.stub.Control(reset, timeout=10)


async def test_a_prompt_is_not_taken_from_kernels_that_round_otherwise(pair) -> None:
    best, lower = pair
    want, others = await ask(best, requests()), await ask(lower, requests())
    # or there would be nothing to keep apart
    assert [a.logprobs for a in want] != [a.logprobs for a in others]
    await forget(best, lower)
    got = await ask(best, requests(lower))
    await asyncio.gather(best.wait_released(), lower.wait_released())
    same(got, want)
    assert [a.logprobs for a in got] == [a.logprobs for a in want]
    assert await best.metric("quire_kv_transfer_blocks_total") == 0


async def test_both_say_what_they_are_and_doctor_what_differs(pair, capsys, monkeypatch) -> None:
    monkeypatch.setattr("quire.cli.checks.machine", lambda: iter(()))
    best, lower = pair
    said = [(await worker.ready()).numerics for worker in pair]
    assert [ISAS[-1] in said[0], ISAS[-2] in said[1]] == [True, True]
    targets = [f"best={best.address}", f"lower={lower.address}"]
    code = await asyncio.to_thread(doctor.run, ["--json", *targets])
    report = json.loads(capsys.readouterr().out)
    assert code == doctor.FAILED
    assert [p["problem"] for p in report["pairs"]] == [
        f"numerics={said[1]} here numerics={said[0]}",
        f"numerics={said[0]} here numerics={said[1]}",
    ]
