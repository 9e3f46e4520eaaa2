"""The mailbox between session and request: nothing lost, bounded, one end."""

from __future__ import annotations

import asyncio

import pytest

from quire.api.errors import ApiError
from quire.gateway.replies import ClientGone, Replies
from quire.proto.worker_pb2 import ChoiceOutput


def make(count=1, max_backlog=10):
    aborted = []
    return Replies(count, max_backlog, lambda *what: aborted.append(what)), aborted


def output(*token_ids):
    return ChoiceOutput(token_ids=token_ids)


async def test_outputs_that_waited_come_together():
    replies, _ = make()
    replies.deliver(0, output(1))
    replies.deliver(0, output(2))
    assert [o.token_ids[0] for _, o in await replies.next()] == [1, 2]


async def test_next_waits_for_something():
    replies, _ = make()
    waiting = asyncio.create_task(replies.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    replies.deliver(0, output(1))
    assert len(await waiting) == 1


async def test_nudge_returns_nothing():
    replies, _ = make()
    replies.nudge()
    assert await replies.next() == []


async def test_outputs_before_an_error_are_handed_over_first():
    replies, _ = make()
    replies.deliver(0, output(1))
    replies.fail(ClientGone())
    replies.fail(ValueError("the first counts"))
    assert len(await replies.next()) == 1
    with pytest.raises(ClientGone):
        await replies.next()


async def test_backlog_is_bounded_and_the_reader_is_told():
    replies, _ = make(max_backlog=3)
    told = []
    replies.on_overflow = lambda: told.append(True)
    replies.deliver(0, output(1, 2, 3))
    assert not told
    replies.deliver(0, output(4))
    assert told
    with pytest.raises(ApiError, match="not read"):
        await replies.next()


async def test_leaving_aborts_what_is_still_open():
    replies, aborted = make(count=3)
    async with replies:
        replies.finish(0)
        replies.abort(1)
        replies.abort(1)
        assert aborted == [(1, None)]
        replies.abort(2, 5)
    assert aborted == [(1, None), (2, 5), (2, None)]
