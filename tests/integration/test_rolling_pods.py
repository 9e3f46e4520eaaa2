"""A rollout: every pod of a fleet is ended by SIGTERM and started again, one after the other, under
steady load. Workers, routers and gateways: no request fails, every text is that of a calm engine.

Clients are at one of two gateways, and go to the other one where nobody listens, as connections to
a Kubernetes Service do.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest
from pages import Growth, samples, total, wait_released
from rollout import ENGINE, running_fleet
from server import running_server
from unlike import Load, assert_same_answers
from waiting import wait_until

ROLES = {"prefill": "prefill", "decode1": "decode", "decode2": "decode"}
PLACED = ("quire_gateway_placements_total{", 'by="router"')
WHOLE_S = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def fleet():
    with running_fleet(**ROLES) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def reference():
    with running_server(*ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def numbers():
    return itertools.count()


def rollout(fleet, reference, numbers, names, during=lambda _: None) -> Load:
    """End and start the processes one by one; `during(name)` while one is away."""
    ports = [gateway.http_port for gateway in fleet.gateways.values()]
    load = Load(ports, numbers)

    async def all_of_them() -> None:
        async with load.running():
            for name in names:
                await asyncio.sleep(1.0)
                await asyncio.to_thread(fleet.processes[name].end)
                await asyncio.to_thread(during, name)
                fleet.processes[name].start()
                await asyncio.to_thread(wait_until, fleet.is_whole, f"{name} is back", WHOLE_S)

    asyncio.run(all_of_them())
    assert_same_answers(reference, load.answers)
    workers = list(fleet.workers.values())
    wait_released(lambda: [worker.get("/metrics") for worker in workers], len(workers))
    return load


def test_every_worker_is_restarted(fleet, reference, numbers) -> None:
    moved = Growth(fleet.pages, "quire_gateway_resubmissions_total{", 'reason="draining"')
    prompts = Growth(
        fleet.pages, "quire_kv_transfers_total{", 'direction="received"', 'outcome="committed"'
    )
    load = rollout(fleet, reference, numbers, fleet.workers, lambda _: prompts.look())
    assert load.turned_away == 0
    assert moved.look() > 0, "no stream had to move"
    assert prompts.look() > 0, "no prompt was computed by the prefill worker"


def test_every_router_is_restarted(fleet, reference, numbers) -> None:
    placed = Growth(fleet.pages, *PLACED)
    least_load = Growth(fleet.pages, PLACED[0], 'by="least_load"')

    def other_decides(_: str) -> None:
        before = placed.look()
        wait_until(lambda: placed.look() > before + 4, "the other router decides")

    load = rollout(fleet, reference, numbers, fleet.routers, other_decides)
    assert load.turned_away == 0
    assert least_load.look() < placed.look()


def test_every_gateway_is_restarted(fleet, reference, numbers) -> None:
    """It takes no connection any more, and finishes the streams that it has."""

    def other_answers(name: str) -> None:
        [other] = fleet.gateways.keys() - {name}
        answered = Growth(
            lambda: [fleet.gateways[other].get("/metrics")],
            "quire_gateway_requests_total{", 'code="200"', 'route="/v1/completions"',
        )  # fmt: skip
        wait_until(lambda: answered.look() > 4, "the other gateway answers")

    load = rollout(fleet, reference, numbers, fleet.gateways, other_answers)
    assert load.turned_away > 0, "nobody had to go to the other gateway"
    pages = fleet.pages()
    assert not any(samples(pages, "quire_gateway_errors_total").values())
    assert total(pages, "quire_gateway_requests_total{", 'code="200"') > 0
