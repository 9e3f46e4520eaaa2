"""NIXL links that misbehave on purpose: the notes beside the writes, and the slots they land in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.transfer import nixl, tcp
from quire.transfer.frames import HEADER_BYTES, unpack
from quire.transfer.landing import Slab

if TYPE_CHECKING:
    import pytest

    from quire.transfer.faults import FaultPlan


def make_faulty(monkeypatch: pytest.MonkeyPatch, plan: FaultPlan) -> None:
    """All links of this process from now on: frames by the plan, and as often as it says
    `corrupt`, one bit of what has landed is flipped."""
    corrupt, plan.corrupt = plan.corrupt, 0.0

    class Notes(tcp.TcpChannel):
        """Whole frames, as the channel is given them."""

        def __init__(self, sock) -> None:
            super().__init__(sock)
            self._held: list[memoryview] = []

        def _put(self, *views: memoryview) -> None:
            fault = plan.pick(unpack(views[0][:HEADER_BYTES]).kind)
            if fault == "drop":
                return
            if fault == "reorder" and not self._held:
                self._held = list(views)
                return
            for _ in range(2 if fault == "duplicate" else 1):
                super()._put(*views)
            held, self._held = self._held, []
            if held:
                super()._put(*held)

    class Slots(Slab):
        """Memory in which not everything lands as it was sent."""

        def read(self, slot: int, head: bytes, length: int) -> memoryview:
            payload = super().read(slot, head, length)
            if length and plan.random.random() < corrupt:
                plan.done["corrupt"] += 1
                payload[plan.random.randrange(length)] ^= 1
            return payload

    monkeypatch.setattr(tcp, "TcpChannel", Notes)
    monkeypatch.setattr(nixl, "Slab", Slots)
