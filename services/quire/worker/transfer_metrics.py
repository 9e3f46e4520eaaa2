"""Copies an endpoint's counts into the worker's metrics, when they are scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from quire.telemetry.instruments import Instruments
    from quire.transfer.base import Counters
    from quire.transfer.flows import Flow, FlowKey


def show_transfers(instruments: Instruments, counters: Counters) -> None:
    """Any thread."""
    get = instruments.get
    flows = counters.flows.items()
    for key, flow in flows:
        _show_flow(instruments, key, flow)
    rates = counters.flows.receive_rates()
    for peer in rates.keys() & {key.peer for key, _ in flows}:  # of those there is a bound
        get(m.KV_RECEIVE_RATE, peer).set(rates[peer])
    for transport, count in list(counters.links.items()):
        get(m.KV_LINKS, transport).value = count
    get(m.KV_REFUSED_LINKS).value = counters.refused_links
    get(m.KV_FENCED_FRAMES).value = counters.fenced_frames
    get(m.KV_QUARANTINED_BYTES).set(counters.quarantined_bytes)


def _show_flow(instruments: Instruments, key: FlowKey, flow: Flow) -> None:
    get = instruments.get
    get(m.KV_TRANSFER_BYTES, *key).value = flow.num_bytes
    get(m.KV_TRANSFER_BLOCKS, *key).value = flow.blocks
    for outcome, count in list(flow.outcomes.items()):
        get(m.KV_TRANSFERS, *key, outcome).value = count
    pair = (key.peer, key.transport)
    if key.way == "received":
        get(m.KV_DAMAGED_PIECES, *pair).value = flow.damaged_pieces
        return
    get(m.KV_REPEATED_PIECES, *pair).value = flow.damaged_pieces
    get(m.KV_TRANSFER_BUSY, *pair).value = flow.busy_s
    get(m.KV_TRANSFER_EXPOSED, *pair).value = flow.exposed_s
