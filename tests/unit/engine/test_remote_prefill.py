"""A prompt computed by another engine: the same tokens as one engine gives, whatever happens to the
other one, and every block of both comes back."""

from __future__ import annotations

import pytest
from engines import Collector, assert_nothing_held, expected_output, make_engine, make_request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.engine.scheduler.scheduler import DrawnToken


class Remote:
    def __init__(self, pair: Pair, name: str) -> None:
        self.pair, self.name = pair, name

    def fence(self) -> None:
        self.pair._fence(self.name)

    def times(self, scheduled: float, first_token: float) -> None:
        return None


class Pair:
    """A decode and a prefill engine, and the transfers between them, one block at a time."""

    def __init__(self, decode, prefill, window: int = 2) -> None:
        self.decode, self.prefill, self.window = decode, prefill, window
        self.collector = Collector()
        self.transfers: dict[str, dict] = {}
        self.fenced: list[str] = []
        self.lost: set[str] = set()

    def submit(self, name: str, prompt: list[int], **params):
        request = make_request(name, prompt, extra={"remote": Remote(self, name)}, **params)
        self.decode.add_request(request)
        self.transfers[name] = {"request": request}
        return request

    def step(self) -> None:
        """One step of each engine, then deliver what is ready."""
        self.collector.take(self.decode.step())
        scheduler = self.decode.scheduler
        for needed in scheduler.prefill_needed:
            self._start(needed)
        scheduler.prefill_needed.clear()
        for output in self.prefill.step():
            transfer = self.transfers.get(output.request_id)
            if transfer is not None:
                transfer.setdefault("drawn", []).append(output.token_ids[0])
        for ready in self.prefill.scheduler.blocks_ready:
            if ready.request_id in self.transfers:
                self.transfers[ready.request_id]["source"] += ready.blocks
                self.transfers[ready.request_id]["all"] = ready.is_last
        self.prefill.scheduler.blocks_ready.clear()
        for name in list(self.transfers):
            self._move(name)
        self.decode.pool.check_integrity()
        self.prefill.pool.check_integrity()

    def _start(self, needed) -> None:
        transfer = self.transfers[needed.request_id]
        transfer |= {"start": needed.start_block, "end": needed.num_blocks, "source": []}
        transfer |= {"slots": [], "moved": needed.start_block}
        request = transfer["request"]
        params = {"n": request.params.n, "max_tokens": 1}
        self.prefill.add_request(
            make_request(
                needed.request_id, request.prompt_token_ids, request.seed,
                extra={"is_exported": True}, **params,
            )
        )  # fmt: skip

    def _move(self, name: str) -> None:
        """Copy blocks that are computed there and bound here, then commit or give up."""
        transfer = self.transfers[name]
        if "slots" not in transfer:
            return
        remote = self.decode.scheduler.remote
        if name in self.lost:
            if name in remote:
                remote.fall_back(name)
            self._drop(name)
            return
        start, end = transfer["start"], transfer["end"]
        bound = start + len(transfer["slots"])
        if bound < end and bound - transfer["moved"] < self.window:
            transfer["slots"] += remote.bind(name, self.window)
        while transfer["moved"] < min(start + len(transfer["slots"]), len(transfer["source"])):
            i = transfer["moved"]
            source, slot = transfer["source"][i], transfer["slots"][i - start]
            self.decode.runner.slots[slot] = self.prefill.runner.slots[source]
            transfer["moved"] += 1
            remote.deliver(name, transfer["moved"])
        if transfer["moved"] == end and transfer.get("all"):
            drawn = [DrawnToken(token) for token in transfer["drawn"]]
            self.collector.take(self.decode.scheduler.complete_remote(name, drawn))
            self._drop(name)

    def _fence(self, name: str) -> None:
        self.fenced.append(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        self.transfers.pop(name, None)
        self.prefill.abort(name)
        self.prefill.scheduler.exports.release(name)

    def run(self) -> Collector:
        for _ in range(3000):
            if not (self.decode.has_work or self.prefill.has_work or self.transfers):
                break
            self.step()
        assert_nothing_held(self.decode)
        assert_nothing_held(self.prefill)
        return self.collector


def check(pair: Pair, requests) -> None:
    for request in requests:
        for choice in range(request.params.n):
            name = request.request_id
            want = expected_output(pair.decode, request, choice)
            got = pair.collector.tokens.get((name, choice), [])
            ended = pair.collector.ended[name, choice]
            assert got == (want[: len(got)] if ended == "abort" else want)


def test_the_decode_engine_computes_nothing_of_the_prompt() -> None:
    pair = Pair(make_engine(), make_engine())
    request = pair.submit("a", [i % 50 for i in range(75)], n=3, max_tokens=10, ignore_eos=True)
    pair.run()
    check(pair, [request])
    assert pair.decode.scheduler.counters.computed_tokens == 3 * 9


def test_blocks_that_are_cached_here_are_not_asked_for() -> None:
    pair = Pair(make_engine(), make_engine())
    first = pair.submit("a", [7] * 64 + [1], max_tokens=2, ignore_eos=True)
    pair.run()
    second = pair.submit("b", [7] * 64 + [2] * 40, max_tokens=2, ignore_eos=True)
    pair.decode.step()
    [needed] = pair.decode.scheduler.prefill_needed
    assert (needed.start_block, needed.num_blocks) == (4, 7)
    pair.run()
    check(pair, [first, second])


@pytest.mark.parametrize("length", [64, 65, 79])
@pytest.mark.parametrize("steps", range(6))
def test_a_lost_prefill_engine_costs_only_what_was_not_verified(length, steps) -> None:
    pair = Pair(make_engine(), make_engine(max_num_batched_tokens=16))
    request = pair.submit("a", [i % 50 for i in range(length)], max_tokens=5, ignore_eos=True)
    for _ in range(steps):
        pair.step()
    verified = pair.transfers.get("a", {}).get("moved", 0)
    pair.lost.add("a")
    pair.run()
    check(pair, [request])
    assert pair.decode.scheduler.counters.computed_tokens <= max(length - 16 * verified, 1) + 4


def test_an_abort_fences_before_blocks_are_released() -> None:
    pair = Pair(make_engine(), make_engine(max_num_batched_tokens=16))
    pair.submit("a", [1] * 100, max_tokens=5)
    pair.step()
    pair.step()
    assert pair.decode.pool.counts().owned > 0
    pair.collector.take(pair.decode.abort("a"))
    assert pair.fenced == ["a"]
    pair.run()


def test_a_waiting_prompt_parks_no_memory_beyond_its_window() -> None:
    pair = Pair(make_engine(num_blocks=64), make_engine(max_num_batched_tokens=16), window=2)
    pair.submit("a", [i % 50 for i in range(200)], max_tokens=2, ignore_eos=True)
    pair.decode.step()
    counts = pair.decode.pool.counts()
    assert (counts.owned, counts.promised) == (0, 13)
    pair.step()
    assert pair.decode.pool.counts().owned <= 4
    pair.run()


workload = st.lists(
    st.tuples(
        st.integers(0, 2),  # shared prefix
        st.integers(1, 90),  # prompt length
        st.integers(1, 16),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 20),  # step of arrival
        st.sampled_from(["", "", "", "lost", "abort"]),
        st.integers(0, 12),  # steps later
    ),
    min_size=1,
    max_size=8,
)


# Preempted before its first token, a prompt that was lost is not asked for again.
PREEMPTED_AFTER_LOSS = [(0, 1, 1, 1, 0, "", 0)] * 4 + [
    (0, 1, 1, 1, 4, "lost", 0),
    (0, 47, 3, 3, 0, "", 0),
]


@example(workload=PREEMPTED_AFTER_LOSS, blocks=8, window=1)
@settings(max_examples=120, deadline=None)
@given(workload=workload, blocks=st.integers(8, 24), window=st.integers(1, 4))
def test_any_mix_of_losses_and_aborts_gives_the_same_tokens(workload, blocks, window) -> None:
    pair = Pair(
        make_engine(blocks, max_model_len=110, max_num_seqs=4, max_num_batched_tokens=40),
        make_engine(blocks, max_model_len=110, max_num_seqs=4, max_num_batched_tokens=24),
        window,
    )
    requests = []
    for step in range(60):
        for i, (prefix, length, max_tokens, n, arrival, fate, later) in enumerate(workload):
            if arrival == step:
                prompt = [(prefix * 7 + j // 16) % 50 for j in range(length)]
                requests.append(pair.submit(str(i), prompt, seed=i, n=n, max_tokens=max_tokens))
            if fate and arrival + later == step:
                if fate == "lost":
                    pair.lost.add(str(i))
                else:
                    pair.collector.take(pair.decode.abort(str(i)))
        pair.step()
    pair.run()
    check(pair, requests)
