"""The CPU library as a whole: every instruction set, threads that sleep, errors, installation."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import cpu

from quire.kernels.layout import KvLayout, KvOrder
from quire.kernels.ops import AttentionShape, Rope, StepInputs

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LAYOUT = KvLayout(1, 1, 16, "float32", KvOrder.LANES)
LIMITS = cpu.StepLimits(max_tokens=64, max_seqs=4, max_blocks_per_seq=4, max_logit_rows=8)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment; OpenMP threads of torch would only fight over few CPUs."""
    path = os.pathsep.join(filter(None, [str(ROOT / "services"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


@pytest.mark.skipif("QUIRE_CPU_ISA" in os.environ, reason="run once, from the best one")
@pytest.mark.parametrize("isa", cpu.available_isas()[:-1])
def test_other_instruction_sets_pass_the_same_tests(isa):
    files = [
        str(HERE / name)
        for name in ("test_cpu_ops.py", "test_cpu_invariance.py", "test_cpu_quantized.py")
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=environment(QUIRE_CPU_ISA=isa),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_an_unknown_instruction_set_is_an_error():
    run = subprocess.run(
        [sys.executable, "-c", "import quire.kernels.cpu as cpu; cpu.load()"],
        env=environment(QUIRE_CPU_ISA="sse9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "QUIRE_CPU_ISA must be one of" in run.stderr


def test_a_missing_library_is_reported_as_unavailable(monkeypatch, tmp_path):
    monkeypatch.setattr("quire.kernels.cpu.library.LIBRARY", tmp_path / "none.so")
    with pytest.raises(cpu.CpuKernelsUnavailable, match="C\\+\\+17 compiler"):
        cpu.load.__wrapped__()


def test_importing_the_package_loads_no_library():
    code = "import quire.kernels.cpu as cpu; assert cpu.load.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def step(rows: int = 3, **changes) -> StepInputs:
    fields = {
        "token_ids": np.arange(rows),
        "positions": np.arange(rows),
        "query_start": np.array([0, rows]),
        "context_lens": np.array([rows]),
        "block_tables": np.array([[2, 0, 1]]),
        "logit_rows": np.array([rows - 1]),
    }
    return StepInputs(**{**fields, **changes})


@pytest.fixture(scope="module")
def program():
    """Embedding, attention and logits of a toy model over 3 blocks and 20 positions."""
    torch.manual_seed(0)
    ops = cpu.CpuOps(LAYOUT, LIMITS, cpu.Team(2))
    shape, table = AttentionShape(1, 1, 16, 0.25), ops.pack_embedding(torch.randn(10, 16))
    rope = Rope(torch.ones(20, 8), torch.zeros(20, 8))
    x = ops.rms_norm(ops.embed(table), torch.ones(16), 1e-6)
    qkv = ops.rope_and_cache(ops.linear(x, ops.pack_linear([torch.randn(48, 16)])), 0, shape, rope)
    heads = ops.take_logit_rows(ops.attention(qkv, 0, shape))
    return ops.finish(ops.logits(heads, table), cpu.alloc_pool(LAYOUT, 3))


BAD_STEPS = {
    "token id outside": step(token_ids=np.array([0, 10, 0])),
    "negative token": step(token_ids=np.array([0, -1, 0])),
    "block outside": step(block_tables=np.array([[3, 0, 1]])),
    "negative block": step(block_tables=np.array([[-1, 0, 1]])),
    "logit row outside": step(logit_rows=np.array([3])),
    "positions beyond the context": step(positions=np.arange(1, 4)),
    "context shorter than rows": step(context_lens=np.array([2])),
    "no rows": step(query_start=np.array([0, 0])),
    "rows missing": step(query_start=np.array([0, 2]), context_lens=np.array([2])),
    "lengths differ": step(token_ids=np.arange(2)),
    "too many logit rows": step(logit_rows=np.zeros(9, int)),
    "too many tokens": step(65),
    "beyond the rotary table": step(1, positions=np.array([20]), context_lens=np.array([21])),
    "table too short": step(20, block_tables=np.array([[0]])),
}


@pytest.mark.parametrize("inputs", BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_a_step_that_cannot_run_is_refused_before_anything_ran(program, inputs):
    program.run(step())
    with pytest.raises(ValueError, match=r"must|step cannot run"):
        program.run(inputs)
    assert np.isfinite(program.run(step())).all()


def test_blocks_behind_every_window_may_be_gone():
    ops = cpu.CpuOps(LAYOUT, LIMITS, cpu.Team(1))
    x = ops.input(48)
    out = ops.attention(x, 0, AttentionShape(1, 1, 16, 0.25, window=10))
    program = ops.finish(out, cpu.alloc_pool(LAYOUT, 3))
    late = step(1, positions=np.array([40]), context_lens=np.array([41]))
    program.run(StepInputs(**{**late.__dict__, "block_tables": np.array([[-1, 0, 1]])}))
    with pytest.raises(ValueError, match="block outside the pool"):
        program.run(StepInputs(**{**late.__dict__, "block_tables": np.array([[0, 1, -1]])}))


def test_operations_that_do_not_fit_are_refused_while_recording():
    ops = cpu.CpuOps(LAYOUT, LIMITS, cpu.Team(1))
    packed = ops.pack_linear([torch.zeros(8, 16)])
    gate_up = ops.pack_gate_up(torch.zeros(8, 16), torch.zeros(8, 16))
    x = ops.input(16)
    with pytest.raises(ValueError, match="cannot take 17 columns"):
        ops.linear(ops.input(17), packed)
    with pytest.raises(ValueError, match="pack_gate_up"):
        ops.gate_up_silu(x, packed)
    with pytest.raises(ValueError, match="serve gate_up_silu alone"):
        ops.linear(x, gate_up)
    with pytest.raises(ValueError, match="residual"):
        ops.linear_add(x, packed, ops.input(9))
    with pytest.raises(ValueError, match="expected a matrix"):
        ops.pack_linear([torch.zeros(8, 16), torch.zeros(8, 15)])
    with pytest.raises(TypeError, match="weights must be one of"):
        ops.pack_linear([torch.zeros(8, 16, dtype=torch.int32)])
    with pytest.raises(ValueError, match="do not fit the cache"):
        ops.attention(x, 0, AttentionShape(1, 1, 8, 1.0))
    with pytest.raises(ValueError, match="outside the cache"):
        ops.attention(ops.input(48), 1, AttentionShape(1, 1, 16, 1.0))
    with pytest.raises(ValueError, match="the pool must be"):
        ops.finish(x, np.zeros((3, 5), np.uint8))
    with pytest.raises(ValueError, match="lanes"):
        cpu.alloc_pool(KvLayout(1, 1, 16, "float32"), 3)


def test_buffers_are_reused_when_their_handles_die():
    ops = cpu.CpuOps(LAYOUT, LIMITS, cpu.Team(1))
    packed = ops.pack_linear([torch.randn(16, 16)])
    x = ops.input(16)
    addresses = []
    for _ in range(6):
        x = ops.linear(x, packed)
        addresses.append(x.array.ctypes.data)
    assert len(set(addresses)) == 2


def test_weights_are_counted():
    ops = cpu.CpuOps(LAYOUT, LIMITS, cpu.Team(1))
    ops.pack_linear([torch.zeros(100, 70)], [torch.zeros(100)])
    assert ops.memory.weights == 128 * 70 * 4 + 128 * 4
    assert ops.memory.activations == 0


def test_an_idle_team_uses_no_cpu(program):
    program.run(step())
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


def test_threads_take_turns_on_one_team():
    team = cpu.Team(2)
    results = []

    def work() -> None:
        ops = cpu.CpuOps(LAYOUT, LIMITS, team)
        x = ops.input(16)
        program = ops.finish(ops.linear(x, ops.pack_linear([torch.eye(16)])), pool)
        x.array[:] = 1.0
        results.append(all((program.run(step()) == 1.0).all() for _ in range(300)))

    pool = cpu.alloc_pool(LAYOUT, 3)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_sources_are_named_through_the_link():
    link = ROOT / "services" / "quire" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../../kernels")


def test_a_team_outlives_its_programs_whatever_the_collector_takes_first():
    """A program's end waits for the team's threads: of a team that is gone, in freed memory."""
    team = cpu.Team(2)
    ops = cpu.CpuOps(LAYOUT, LIMITS, team)
    program = ops.finish(ops.input(32, "float32"), cpu.alloc_pool(LAYOUT, 3))
    is_there = weakref.ref(team)
    del team, ops
    vars(program).clear()  # as of a cycle
    gc.collect()
    assert is_there()
    del program
    gc.collect()
    assert not is_there()
