"""The decode role between an engine, an endpoint and another worker, one message at a time: every
transfer ends, whatever ends first, and nothing but what was asked for counts as a prompt."""

from __future__ import annotations

import asyncio

import pytest
from engines import assert_nothing_held, expected_output, make_engine, make_request

from quire.proto import worker_pb2
from quire.transfer.layout import Shard
from quire.transfer.negotiate import Peer
from quire.transfer.state import Commit, Delivered, Ended, Failure, TransferRef
from quire.worker.roles.decode import DecodeRole

PROMPT = list(range(1, 41))
REF = TransferRef(7, 1, 9)


class Loop:
    """An engine's loop whose inbox is emptied when the test says so."""

    def __init__(self) -> None:
        self.engine = make_engine()
        self.inbox, self.outputs = [], []

    def call(self, function) -> None:
        self.inbox.append(lambda: function(self.engine))

    def complete_remote(self, request_id, drawn) -> None:
        scheduler = self.engine.scheduler
        self.inbox.append(lambda: self.outputs.extend(scheduler.complete_remote(request_id, drawn)))

    def take_in(self) -> None:
        while self.inbox:
            self.inbox.pop(0)()

    def run(self) -> list[int]:
        """Step to the end; the tokens."""
        while self.engine.has_work:
            self.outputs += self.engine.step()
        return [token for output in self.outputs for token in output.token_ids]


class Endpoint:
    def __init__(self) -> None:
        self.said = []

    def receive(self, num_blocks: int) -> TransferRef:
        self.said.append(("receive", num_blocks))
        return REF

    def grant(self, ref, first, slots) -> None:
        self.said.append(("grant", first, len(slots)))

    def cancel(self, ref) -> None:
        self.said.append(("cancel",))

    def fence(self, ref) -> None:
        self.said.append(("fence",))


class Call:
    """A Prefill rpc that is never answered."""

    def __init__(self, request) -> None:
        self.request = request

    async def read(self):
        await asyncio.Event().wait()

    def cancel(self) -> None: ...


class Peers:
    def stub(self, address):
        return self

    Prefill = Call


class Scene:
    def __init__(self) -> None:
        self.loop, self.endpoint = Loop(), Endpoint()
        peer = Peer("me", 9, Shard(), ())
        self.role = DecodeRole(self.loop, self.endpoint, peer, Peers())

    def admit(self):
        """A request whose prompt another worker computes is admitted; what the role is told."""
        submit = worker_pb2.Submit(
            request_id="r", prompt_token_ids=PROMPT, sampling={"n": 1},
            prefill={"worker": "other", "address": "there"},
        )  # fmt: skip
        remote = self.role.prompt("r", submit)
        request = make_request("r", PROMPT, extra={"remote": remote}, max_tokens=4)
        self.want = expected_output(self.loop.engine, request, 0)
        self.loop.engine.add_request(request)
        self.loop.engine.step()
        needed = self.loop.engine.scheduler.prefill_needed
        self.loop.engine.scheduler.prefill_needed = []
        return needed[0]

    def deliver(self, blocks: int) -> None:
        """Blocks of the prompt arrive, with what the other worker computed."""
        seq, _ = self.loop.engine.scheduler.remote._waiting["r"]
        for block in range(blocks):
            slot = seq.block_table[block]
            tokens = PROMPT[16 * block : 16 * block + 16]
            self.loop.engine.runner.slots[slot, : len(tokens)] = tokens
            self.role.on_event(Delivered(REF, block, slot))

    def commit(self, blocks: int, tokens: list[int]) -> None:
        meta = worker_pb2.FirstTokens(choices=[{"token_id": token} for token in tokens])
        commit = Commit(blocks, len(PROMPT), meta.SerializeToString())
        self.role.on_event(Ended(REF, commit=commit))


@pytest.fixture
async def scene():
    scene = Scene()
    yield scene
    scene.role.close()
    assert not scene.role._prompts
    assert_nothing_held(scene.loop.engine)


async def test_a_request_that_ends_before_its_transfer_was_begun_leaves_none(scene) -> None:
    """Its abort was carried out by the engine while the role was about to hear of it: there was
    nothing to fence yet. Both workers would keep such a transfer alive for each other."""
    needed = scene.admit()
    scene.loop.engine.abort("r")
    scene.role.on_prefill_needed(needed)
    scene.loop.take_in()
    assert scene.endpoint.said == [("receive", 3), ("cancel",)]
    scene.role.on_event(Ended(REF, Failure.CANCELLED))


async def test_a_prompt_that_arrives_whole_runs_on(scene) -> None:
    needed = scene.admit()
    scene.role.on_prefill_needed(needed)
    scene.loop.take_in()
    assert scene.endpoint.said == [("receive", 3), ("grant", 0, 3)]
    scene.deliver(3)
    scene.commit(3, scene.want[:1])
    scene.loop.take_in()
    assert scene.loop.run() == scene.want


@pytest.mark.parametrize(
    ("blocks", "tokens"), [(2, [5]), (3, []), (3, [5, 6])], ids=["blocks", "no token", "tokens"]
)
async def test_a_commit_of_anything_else_is_computed_here(scene, blocks, tokens) -> None:
    """Blocks that nobody filled would count as computed; other numbers of tokens end the engine."""
    needed = scene.admit()
    scene.role.on_prefill_needed(needed)
    scene.loop.take_in()
    scene.deliver(2)
    scene.commit(blocks, tokens)
    scene.loop.take_in()
    assert scene.loop.run() == scene.want
