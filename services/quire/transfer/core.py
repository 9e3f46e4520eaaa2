"""An endpoint's inside: listeners, links and timers on one event loop.

start()   listen on every transport, begin to tick
dial      once per peer process, shared by its transfers; the first transport that works
close()   cancel every transfer, tell the caller, close links and listeners
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from quire.transfer.layout import share
from quire.transfer.link import Link, LinkRefused
from quire.transfer.negotiate import Peer, choose
from quire.transfer.probe import Measurement, measure
from quire.transfer.receiver import Receiver
from quire.transfer.receiving_link import ReceivingLink
from quire.transfer.sender import Sender
from quire.transfer.sending_link import SendingLink
from quire.transfer.state import Ended, Failure, TransferRef

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from quire.transfer.base import Channel, Node, Transport
    from quire.transfer.state import Event

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.05
KEEPS_PER_LEASE = 5


class Core:
    """See the module. Everything is called on its event loop."""

    def __init__(
        self, node: Node, transports: Sequence[Transport], emit: Callable[[Event], None]
    ) -> None:
        self.node = node
        self.receiver = Receiver(node, emit)
        self.sender = Sender(node, emit)
        self.rates: dict[str, dict[str, float]] = {}
        """Worker -> transport -> bytes per second that probes gave."""
        self._emit = emit
        self._transports = {transport.name: transport for transport in transports}
        self._links: set[Link] = set()
        self._dialled: dict[int, asyncio.Task[SendingLink]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- life

    async def start(self) -> None:
        """Listen. Raises OSError when a port is taken."""
        for transport in self._transports.values():
            address = await transport.listen(self._acceptor(transport.name))
            self.node.listeners.append((transport.name, address))
        self._own(self._tick())

    async def close(self) -> None:
        """End everything; the last events are emitted before it returns."""
        for link in list(self._links):
            link.close("the endpoint stops")
        self.receiver.tick(float("inf"), keep=False)
        self.sender.tick(float("inf"), keep=False)
        await self.node.memory.close()  # the last transfers end with the last copies
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports.values():
            await transport.close()
        self.sender.helper.shutdown()

    def peer(self) -> Peer:
        """How others reach this endpoint."""
        identity = self.node.identity
        listeners = tuple(self.node.listeners)
        return Peer(identity.worker, identity.incarnation, identity.shard, listeners)

    # ---- transfers

    def receive(
        self, ref: TransferRef, num_blocks: int, degree: int | None, lease_s: float
    ) -> None:
        """Expect a transfer. Any thread. Raises ValueError on a degree that does not fit."""
        self.receiver.promise(ref, num_blocks, degree, lease_s)

    def send(self, ref: TransferRef, peer: Peer, lease_s: float) -> None:
        """Begin to send; ends at once when this rank has nothing for that one."""
        identity = self.node.identity
        try:
            span = share(identity.layout, identity.shard, peer.shard)
        except ValueError as error:
            self._emit(Ended(ref, Failure.INCOMPATIBLE, str(error)))
            return
        if span is None:
            self._emit(Ended(ref, Failure.PROTOCOL, "this rank holds nothing of that one's heads"))
            return
        self.sender.begin(ref, span, lease_s, peer.worker)
        self._own(self._connect(ref, peer))

    async def _connect(self, ref: TransferRef, peer: Peer) -> None:
        try:
            link = await self.link_to(peer)
        except LinkRefused as refusal:
            self.sender.refuse(ref, refusal.failure, refusal.detail)
        else:
            self.sender.connect(ref, link)

    # ---- links

    async def link_to(self, peer: Peer) -> SendingLink:
        """The link to a process, made when there is none. Raises LinkRefused."""
        known = self._dialled.get(peer.incarnation)
        if known is None or (known.done() and not _stands(known)):
            known = self._own(self._dial(peer))
            self._dialled[peer.incarnation] = known
        return await asyncio.shield(known)

    async def _dial(self, peer: Peer) -> SendingLink:
        preferred = [name for name in self.node.config.kv_transports if name in self._transports]
        problems = []
        rates = self.rates.get(peer.worker, {})
        for name, address in choose(preferred, peer.listeners, rates):
            try:
                return await self._dial_by(name, address, peer.incarnation)
            except LinkRefused as refusal:
                if refusal.failure is Failure.INCOMPATIBLE:
                    raise
                problems.append(f"{name} {address}: {refusal.detail}")
        why = "; ".join(problems) or f"no transport in common, here {', '.join(preferred)}"
        raise LinkRefused(Failure.UNREACHABLE, why)

    async def _dial_by(self, name: str, address: str, incarnation: int) -> SendingLink:
        try:
            async with asyncio.timeout(self.node.config.kv_connect_timeout_s):
                channel = await self._transports[name].dial(address)
        except (OSError, TimeoutError) as error:
            raise LinkRefused(Failure.UNREACHABLE, str(error) or "no answer in time") from error
        link = SendingLink(channel, name, self.node, self.sender)
        link.expected_incarnation = incarnation
        await link.greet()
        self._keep(link)
        return link

    def _acceptor(self, name: str) -> Callable[[Channel], None]:
        def accept(channel: Channel) -> None:
            self._own(self._welcome(ReceivingLink(channel, name, self.node, self.receiver)))

        return accept

    async def _welcome(self, link: ReceivingLink) -> None:
        try:
            await link.greet()
        except LinkRefused as refusal:
            logger.warning("KV link over %s refused: %s", link.transport, refusal.detail)
        else:
            self._keep(link)

    def _keep(self, link: Link) -> None:
        self._links.add(link)
        task = self._own(link.run())
        task.add_done_callback(lambda _: self._links.discard(link))

    async def probe(self, peer: Peer, name: str, num_bytes: int) -> Measurement:
        """Measure a transport to a peer. Raises LinkRefused when it does not lead there."""
        address = dict(peer.listeners).get(name)
        if name not in self._transports or address is None:
            where = peer.worker if name in self._transports else self.node.identity.worker
            raise LinkRefused(Failure.UNREACHABLE, f"{where} has no {name}")
        link = await self._dial_by(name, address, peer.incarnation)
        measured = await measure(link, num_bytes)
        self.rates.setdefault(peer.worker, {})[name] = measured.bytes_per_s
        return measured

    # ---- timers

    async def _tick(self) -> None:
        next_keep = 0.0
        keep_s = min(self.node.config.kv_lease_s, 5.0) / KEEPS_PER_LEASE
        before = self.node.clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = self.node.clock()
            if now - before > self.node.config.kv_heartbeat_s:
                # This process was stopped or starved: what the peers said meanwhile is not read
                # yet, so their silence proves nothing.
                for link in self._links:
                    link.heard()
            before = now
            for link in list(self._links):
                link.tick(now)
            keep = now >= next_keep
            if keep:
                next_keep = now + keep_s
            self.receiver.tick(now, keep=keep)
            self.sender.tick(now, keep=keep)

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LinkRefused):
            logger.error("KV transfer task failed", exc_info=error)


def _stands(task: asyncio.Task[SendingLink]) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().is_ready
