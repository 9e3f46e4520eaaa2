"""A gateway's session: which request is which."""

from __future__ import annotations

import pytest

from quire.engine.output import ChoiceOutput
from quire.engine.request import FinishReason
from quire.proto import worker_pb2
from quire.worker.session import GatewaySession


def opened(session: GatewaySession, number: int, attempt: int = 0) -> str:
    submit = worker_pb2.Submit(request=number, attempt=attempt, request_id="r")
    return session.open(submit)


def test_requests_are_found_by_number_until_they_end() -> None:
    session = GatewaySession()
    first, second = opened(session, 1), opened(session, 2, attempt=3)
    assert (session.engine_id(1), session.engine_id(2)) == (first, second)
    assert session.end(second) == (2, 3)
    assert session.engine_id(2) is None
    with pytest.raises(KeyError):
        session.end(second)
    assert list(session.requests) == [first]


async def test_the_last_output_ends_a_request() -> None:
    session = GatewaySession()
    engine_id = opened(session, 7)
    output = ChoiceOutput(engine_id, 0, 0, [1], finish_reason=FinishReason.STOP)
    output.last_of_request = True
    session.deliver(1, [output])
    session.close()
    [reply] = [reply async for reply in session.replies()]
    assert reply.batch.outputs[0].request == 7
    assert session.engine_id(7) is None
    assert not session.requests
