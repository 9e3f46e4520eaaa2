"""One rank's end of KV transfer: the caller's verbs, from any thread.

    endpoint = Endpoint(config, identity, memory, on_event)
    endpoint.start()
    ...
    endpoint.close()

Runs a thread of its own. Verbs return at once; what comes of them arrives as events, on that
thread, in order: `on_event` must neither block nor raise. A block given to `grant` or `offer`
belongs to the transfer until an event gives it back, and every one comes back exactly once. After
`close` verbs end at once, with their events, on the caller's thread.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from quire.transfer.base import Counters, Node
from quire.transfer.core import Core
from quire.transfer.state import Commit, Ended, Failure, Released, TransferRef, new_number
from quire.transfer.transports import make_transports

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Transport
    from quire.transfer.memory import PoolMemory
    from quire.transfer.negotiate import Identity, Peer
    from quire.transfer.probe import Measurement
    from quire.transfer.state import Event

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0
FENCE_TIMEOUT_S = 5.0
PROBE_BYTES = 64 << 20


class Endpoint:
    """See the module. `transports`: instead of those that the config names."""

    def __init__(
        self,
        config: TransferConfig,
        identity: Identity,
        memory: PoolMemory,
        on_event: Callable[[Event], None],
        transports: Sequence[Transport] | None = None,
    ) -> None:
        self._config = config
        self._identity = identity
        node = Node(identity, config, memory, time.monotonic)
        chosen = make_transports(config, node) if transports is None else transports
        self._on_event = on_event
        self._core = Core(node, chosen, self._emit)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._started: Future[Peer] = Future()
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)

    # ---- life

    def start(self) -> Peer:
        """Listen; returns how others reach this rank. Raises OSError when a port is taken."""
        self._thread.start()
        return self._started.result(START_TIMEOUT_S)

    def close(self) -> None:
        """End every transfer, with its events, and the thread."""
        if self._loop is not None and self._stop is not None:
            self._post(self._stop.set)
        self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def counters(self) -> Counters:
        """What happened so far, for metrics."""
        return self._core.node.counters

    # ---- receiving: the decode side

    def receive(
        self,
        num_blocks: int,
        *,
        degree: int | None = None,
        after: TransferRef | None = None,
        lease_s: float | None = None,
    ) -> TransferRef:
        """Expect up to `num_blocks` blocks from a group of `degree` ranks; binds nothing.

        Without a degree it is that of whoever sends first. The reference goes to the senders with
        `start()`'s Peer. Raises ValueError when the KV heads cannot be split over the degree.
        `after` names an earlier attempt at the same transfer: it is cancelled, and whatever of it
        still arrives is fenced.
        """
        ref = self._new_ref(num_blocks, after)
        if after is not None:
            self._post(self._core.receiver.cancel, after)
        self.expect(ref, num_blocks, degree=degree, lease_s=lease_s)
        return ref

    def expect(
        self,
        ref: TransferRef,
        num_blocks: int,
        *,
        degree: int | None = None,
        lease_s: float | None = None,
    ) -> None:
        """Expect a transfer whose reference was made elsewhere, for this rank's incarnation."""
        # Not posted: the sender may hear of the reference, and answer, before a posted call runs.
        self._core.receive(ref, num_blocks, degree, self._lease(lease_s))
        if not self._post(self._core.receiver.admit_early, ref):
            self._core.receiver.cancel(ref)

    def _new_ref(self, num_blocks: int, after: TransferRef | None) -> TransferRef:
        if num_blocks < 1:
            raise ValueError("a transfer has at least one block and one sender")
        number, epoch = (after.transfer, after.epoch + 1) if after else (new_number(), 1)
        return TransferRef(number, epoch, self._identity.incarnation)

    def grant(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """Bind blocks [first, first + len(slots)) of the transfer to these blocks of the pool.

        Events: Delivered for each that arrived whole, Released for the others.
        """
        if not self._post(self._core.receiver.grant, ref, first, tuple(slots)):
            self._emit(Released(ref, tuple(slots)))

    def renew(self, ref: TransferRef) -> None:
        """Keep waiting: the sender was heard of by other means."""
        self._post(self._core.receiver.renew, ref)

    # ---- sending: the prefill side

    def send(self, ref: TransferRef, peer: Peer, *, lease_s: float | None = None) -> None:
        """Begin to send to one rank; connects when there is no link to it yet."""
        if not self._post(self._core.send, ref, peer, self._lease(lease_s)):
            self._emit(Ended(ref, Failure.CANCELLED, "the endpoint has ended"))

    def offer(self, ref: TransferRef, first: int, slots: Sequence[int]) -> None:
        """Blocks [first, ...) of the transfer are computed, in these blocks of the pool.

        They are read until Released. They go out as the receiver grants them.
        """
        if not self._post(self._core.sender.offer, ref, first, tuple(slots)):
            self._emit(Released(ref, tuple(slots)))

    def commit(self, ref: TransferRef, *, blocks: int, tokens: int, meta: bytes = b"") -> None:
        """Everything is offered: blocks 0 .. blocks - 1. Event: Ended, when the receiver has it."""
        self._post(self._core.sender.commit, ref, Commit(blocks, tokens, meta))

    # ---- both

    def cancel(self, ref: TransferRef) -> None:
        """Give up, on either side. Unknown references are ignored: it may just have ended."""
        self._post(self._core.receiver.cancel, ref)
        self._post(self._core.sender.cancel, ref)

    def fence(self, ref: TransferRef, timeout_s: float = FENCE_TIMEOUT_S) -> None:
        """Cancel, and return when nothing writes into granted blocks any more.

        For whoever must release them at once. Not on the endpoint's thread. Raises TimeoutError.
        """
        done: Future[None] = Future()

        if self._post(self._core.receiver.stop, ref, lambda: done.set_result(None)):
            done.result(timeout_s)

    def probe(
        self, peer: Peer, transport: str, num_bytes: int = PROBE_BYTES
    ) -> Future[Measurement]:
        """Measure the way from here to a peer over one transport, or LinkRefused. The rates are
        remembered: later links to the peer prefer the transport that measured faster."""
        return self._submit(self._core.probe(peer, transport, num_bytes))

    # ----

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # a caller's mistake must not cost the other transfers their timers
            logger.exception("on_event raised at %s", event)

    def _lease(self, lease_s: float | None) -> float:
        return self._config.kv_lease_s if lease_s is None else lease_s

    def _post(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Have it called on the endpoint's thread; False when that has ended."""
        if self._loop is None:
            raise RuntimeError("the endpoint is not started")
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: every transfer has ended
            return False
        return True

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            raise RuntimeError("the endpoint is not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self) -> None:
        if sys.platform == "win32":
            asyncio.run(self._main())
        else:
            import uvloop

            uvloop.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self._core.start()
        except OSError as error:
            await self._core.close()
            self._started.set_exception(error)
            return
        self._started.set_result(self._core.peer())
        try:
            await self._stop.wait()
        finally:
            await self._core.close()
