"""Tensor parallelism: the same tokens at any degree, whoever shares a step; ranks that are lost.

Every architecture over ranks that are threads; one over processes; all of them over processes in
the slow suite.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from kept_figures import show
from parallel_models import SHARED
from prometheus_client import CollectorRegistry
from ranks import load_in_threads
from test_parity import LENGTHS, generate, load, prompt, request
from tiny_models import build

from quire.api.sampling import SamplingParams
from quire.config.engine import EngineConfig
from quire.engine.loop import EngineLoop
from quire.engine.models.config import parse_config
from quire.engine.models.llama import weight_shapes
from quire.engine.parallel.gang import RankFailed
from quire.engine.request import EngineRequest
from quire.telemetry import metrics as m
from quire.worker.metrics import EngineMetrics

IDS = [tiny.name for tiny in SHARED]
GQA, QWEN3 = IDS.index("llama-gqa3"), IDS.index("qwen3-qknorm")
ENDED_S = 20
"""Far beyond what a rank's end takes, far below any time limit of an exchange."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of an architecture, by index and dtype."""

    @cache
    def get(index: int, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("model")
        build(SHARED[index], folder, dtype)
        return folder

    return get


def requests():
    return [request(i, prompt(i, length)) for i, length in enumerate(LENGTHS, start=1)]


def in_threads(folder: Path, degree: int, **options):
    defaults = {"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8, "device": "cpu"}
    return load_in_threads(
        EngineConfig(
            model=str(folder), tensor_parallel_size=degree, num_threads=1, **defaults | options
        )
    )


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("index", range(len(SHARED)), ids=IDS)
def test_tokens_are_the_same_at_any_degree(checkpoint, index, degree) -> None:
    folder = checkpoint(index)
    want = generate(load(folder), requests())[0]

    def check(how: str, **options) -> None:
        engine = in_threads(folder, degree, **options)
        assert generate(engine, requests())[0] == want, how
        if how == "batched":
            assert generate(engine, requests())[0] == want, "with a prefix hit"
            assert engine.scheduler.counters.cache_hits > 100
        assert (engine.scheduler.counters.preemptions > 0) == (how == "preempted")
        engine.close_ranks()

    check("batched")
    if degree > 2:
        return
    check("chunked", max_num_batched_tokens=8, max_num_seqs=5)
    block_bytes = in_threads(folder, degree).runner.backend.layout.block_bytes
    check("preempted", kv_cache_memory_bytes=12 * block_bytes, max_model_len=110)
    check("operation by operation", enforce_eager=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_do_not_depend_on_who_shares_the_step(checkpoint, dtype) -> None:
    folder = checkpoint(GQA, dtype)
    alone = in_threads(folder, 2, enable_prefix_caching=False)
    want = {}
    for entry in requests():
        want |= generate(alone, [entry])[1]
    for options in ({}, {"max_num_batched_tokens": 8, "max_num_seqs": 5}):
        _, got = generate(in_threads(folder, 2, **options), requests())
        assert got.keys() == want.keys()
        for key, logits in got.items():
            assert torch.equal(logits, want[key]), key


def test_narrow_dtypes_stay_as_close_to_the_truth(checkpoint) -> None:
    """Ranks round their part of a sum to nothing narrower than float32."""
    one, two = load(checkpoint(GQA, "bfloat16")), in_threads(checkpoint(GQA, "bfloat16"), 2)
    entry = request(1, prompt(1, 101), max_tokens=1)
    [a], [b] = (generate(engine, [entry])[1].values() for engine in (one, two))
    assert (a - b).square().mean().sqrt() < 0.02 * a.std()


@pytest.fixture(scope="module")
def pair(checkpoint):
    """A model on two processes, and the same on one."""
    two = load(checkpoint(QWEN3), tensor_parallel_size=2)
    yield two, load(checkpoint(QWEN3))
    two.model.gang.close()


def test_two_processes_give_the_tokens_of_one(pair) -> None:
    two, one = pair
    assert len(two.model.gang.pids) == 1
    assert two.runner.backend.layout.num_kv_heads == 1
    assert generate(two, requests())[0] == generate(one, requests())[0]


def test_what_the_other_rank_does_is_seen_on_rank_0s_page(pair) -> None:
    two, _ = pair
    [member] = two.model.gang.members()
    before = member.vitals.steps
    stepped = len(outputs_of(two, [request(77, prompt(77, 20), max_tokens=8)])[("77", 0)])
    deadline = time.monotonic() + ENDED_S
    while member.vitals.steps < before + stepped:
        assert time.monotonic() < deadline, member.vitals
        time.sleep(0.05)
    registry = CollectorRegistry()
    labels = {"model_name": "m", "engine": "e"}
    instruments = m.Instruments("engine", m.DECLARATIONS, registry, labels)
    EngineMetrics(instruments).ranks(two.model.gang)
    page = {
        sample.name + sample.labels["rank"] + sample.labels.get("of", ""): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.startswith("quire_rank")
    }
    assert page.keys() == {
        "quire_rank_steps_total1", "quire_rank_silence_seconds1",
        "quire_rank_memory_bytes1host", "quire_rank_memory_bytes1device",
    }  # fmt: skip
    assert page["quire_rank_steps_total1"] == member.vitals.steps
    assert page["quire_rank_silence_seconds1"] < ENDED_S
    assert page["quire_rank_memory_bytes1host"] > 50e6


def outputs_of(engine, entries):
    for entry in entries:
        engine.add_request(entry)
    found: dict = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.choice), []).append(output)
        engine.pool.check_integrity()
    return found


def test_draws_and_scores_are_those_of_one_process(pair) -> None:
    """Parallel samples copy blocks on every rank; scores come from rank 0's joined logits."""
    common = {"temperature": 0.9, "ignore_eos": True, "max_tokens": 20}
    params = [{"n": 3}, {"top_p": 0.8, "logprobs": 3}, {"prompt_logprobs": 2}]
    entries = [
        EngineRequest(
            request_id=str(seed),
            prompt_token_ids=prompt(seed, 37),
            params=SamplingParams(**common, **extra),
            seed=seed,
        )
        for seed, extra in enumerate(params)
    ]
    two, one = (outputs_of(engine, entries) for engine in pair)
    assert two.keys() == one.keys()
    for key, mine in two.items():
        assert [o.token_ids for o in mine] == [o.token_ids for o in one[key]], key
    scores, wanted = (
        [entry for o in found[("1", 0)] for entry in o.logprobs] for found in (two, one)
    )
    assert [entry.top_ids for entry in scores] == [entry.top_ids for entry in wanted]
    assert [e.logprob for e in scores] == pytest.approx([e.logprob for e in wanted], abs=1e-3)


def test_each_rank_has_room_for_as_many_blocks(checkpoint) -> None:
    """Half the heads: twice the blocks in the same memory, and a profiling run agrees too."""
    engine = load(checkpoint(GQA), tensor_parallel_size=2, kv_cache_memory_bytes=None)
    try:
        assert engine.runner.num_blocks > 0
        assert generate(engine, requests())[0] == generate(load(checkpoint(GQA)), requests())[0]
    finally:
        engine.model.gang.close()


def test_a_degree_that_does_not_fit_starts_nothing(checkpoint) -> None:
    with pytest.raises(ValueError, match="over 1, 2, 4, 8 ranks: give --tensor-parallel-size"):
        load(checkpoint(GQA), tensor_parallel_size=3)


def test_a_cache_too_small_on_every_rank_is_one_line_for_the_user(checkpoint) -> None:
    with pytest.raises(ValueError, match=r"\): give --kv-cache-memory-bytes \d+ or more"):
        load(checkpoint(GQA), tensor_parallel_size=2, kv_cache_memory_bytes=4096)


def wait_gone(pids) -> None:
    deadline = time.monotonic() + ENDED_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.05)


class Deaf:
    """A sink that notes the engine's death."""

    def __init__(self) -> None:
        self.died = threading.Event()
        self.error: BaseException | None = None

    def on_death(self, error) -> None:
        self.error = error
        self.died.set()

    def __getattr__(self, name: str):
        return lambda *_: None


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSTOP, "no sign of life")],
)
def test_a_lost_rank_ends_the_engine(checkpoint, number, words, is_busy) -> None:
    engine = load(checkpoint(GQA), tensor_parallel_size=2)
    gang, sink = engine.model.gang, Deaf()
    [pid] = gang.pids
    loop = EngineLoop(engine, sink)
    loop.start()
    if is_busy:
        loop.submit(request(1, prompt(1, 90), max_tokens=400))
        while loop.state.steps < 3:
            time.sleep(0.01)
    os.kill(pid, number)
    assert sink.died.wait(ENDED_S), "the engine goes on"
    assert isinstance(sink.error, RankFailed)
    assert words in str(sink.error)
    assert f"rank 1 (pid {pid})" in str(sink.error)
    wait_gone([pid])
    with pytest.raises(RankFailed, match=words):
        engine.add_request(request(2, prompt(2, 20)))
        engine.step()


def test_ranks_end_with_a_script_that_is_killed(checkpoint, tmp_path) -> None:
    script = (
        "import sys, time\n"
        "from quire import LLM\n"
        f"llm = LLM({str(checkpoint(GQA))!r}, tensor_parallel_size=2, device='cpu',\n"
        f"          kv_cache_memory_bytes=8 << 20, tokenizer='demo')\n"
        "print(*llm.engine.model.gang.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pids = list(map(int, process.stdout.readline().split()))
        assert len(pids) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_gone(pids)


def test_without_tensor_parallelism_nothing_of_it_is_imported(checkpoint) -> None:
    script = (
        "import sys\n"
        "from quire import LLM\n"
        f"LLM({str(checkpoint(GQA))!r}, kv_cache_memory_bytes=8 << 20, tokenizer='demo')\n"
        "assert 'quire.engine.parallel' not in sys.modules\n"
        "import torch.distributed\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}
"""0.5 GB of weights: what a process needs besides is small against them."""


def resident_after_load(folder: Path, degree: int) -> tuple[int, list[int]]:
    """Bytes that the weights take by count, and resident bytes of each rank's process, beyond what
    they have without a model. Measured after a request: once a rank takes part in it, it has let go
    of the checkpoint, which rank 0 does not wait for while it loads."""
    script = (
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from quire.api.sampling import SamplingParams\n"
        "from quire.config.engine import EngineConfig\n"
        "from quire.engine.engine import Engine\n"
        "from quire.engine.request import EngineRequest\n"
        "import quire.engine.parallel.gang\n"
        "def resident(pid):\n"
        "    page = os.sysconf('SC_PAGE_SIZE')\n"
        "    return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * page\n"
        "before = resident('self')\n"
        f"config = EngineConfig(model={str(folder)!r}, tensor_parallel_size={degree},\n"
        "    device='cpu', kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=64,\n"
        "    max_num_seqs=4, num_threads=1)\n"
        "engine = Engine.load(config, lambda _: None)\n"
        "params = SamplingParams(max_tokens=2)\n"
        "entry = EngineRequest(request_id='r', prompt_token_ids=[1, 2, 3], params=params, seed=1)\n"
        "engine.add_request(entry)\n"
        "while engine.has_work:\n"
        "    engine.step()\n"
        "pids = engine.model.gang.pids if engine.model.gang else ()\n"
        "sizes = [resident(pid) - before for pid in ('self', *pids)]\n"
        "print(json.dumps([engine.runner.backend.ops.memory.weights, sizes]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=200, stdout=subprocess.PIPE
    )
    weights, sizes = json.loads(done.stdout)
    return weights, sizes


@pytest.mark.slow
def test_a_rank_of_two_holds_little_more_than_half(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    shapes = weight_shapes(parse_config(LARGE, {}))
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    weights, [whole] = resident_after_load(tmp_path, 1)
    half_weights, halves = resident_after_load(tmp_path, 2)
    show("weights", one_process_mb=weights / 1e6, rank_of_two_mb=half_weights / 1e6)
    show("one process", resident_mb=whole / 1e6)
    for rank, half in enumerate(halves):
        show(f"rank {rank} of two", resident_mb=half / 1e6, share_of_one_process=half / whole)
    assert half_weights <= 0.51 * weights
    assert len(halves) == 2
    assert max(halves) <= 0.55 * whole


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("index", range(len(SHARED)), ids=IDS)
def test_processes_give_the_tokens_of_one_for_every_architecture(checkpoint, index, degree) -> None:
    folder = checkpoint(index)
    want = generate(load(folder), requests())[0]
    for options in ({}, {"max_num_batched_tokens": 8, "max_num_seqs": 5}, {"enforce_eager": True}):
        engine = load(folder, tensor_parallel_size=degree, **options)
        try:
            assert generate(engine, requests())[0] == want, options
        finally:
            engine.model.gang.close()
