"""The pods as this router knows them: their reports, what it sent them since, and their caches.

    connected -> model (its cache counts as empty) -> load reports, cache events -> ... -> lost

A pod's state is one entry in each column, at its slot. What is decided has its effect at once: the
chosen pod's queue, batch and memory grow by the request, its prompt counts as cached. A load report
replaces what was assumed, except for requests too young to be in it. So a burst spreads, between
reports too, and a router that only sees its own picks is corrected by every report.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.router.endpoints import COLUMNS, Endpoint, Endpoints
from quire.router.in_flight import InFlight
from quire.router.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quire.router.endpoints import Floats
    from quire.router.query import RouteQuery
    from quire.router.reports import LoadReport, PodModel

REPORT_LAG_S = 0.25
"""A request picked so shortly before a report arrived may not be in it."""
TRUST_MEMORY = 0.8
"""Share of the old trust that one observation leaves."""
MIN_TRUST = 0.5
"""A pod trusted less has drifted: its cache is asked for again."""
FULL_TRUST = 0.95
DRIFT_PERIOD_S = 30.0
"""Least seconds between two such questions to one pod."""
SHARE_MEMORY = 0.8
"""Share of the old sums that the next prompt leaves."""
FIRST_SLOTS = 16


@dataclass(frozen=True, slots=True)
class _Pick:
    """What a decision added to a pod, until a report that must contain it."""

    at: float
    prefill_s: float
    streams: float
    blocks: float


@dataclass
class Pod:
    """One pod's bookkeeping beside the columns."""

    pod: str
    slot: int
    incarnation: int
    picks: deque[_Pick] = field(default_factory=deque)
    missing_tokens: float = 0.0
    prompt_tokens: float = 0.0
    """Decayed sums over the prompts sent here."""
    next_drift_resync: float = 0.0
    resync: bool = False
    """Its cache has to be asked for again."""

    @property
    def uncached_share(self) -> float:
        """Share of its waiting tokens that it will have to compute: it cannot tell, we can."""
        return self.missing_tokens / self.prompt_tokens if self.prompt_tokens else 1.0

    def note_share(self, missing: float, prompt_len: int) -> None:
        """A prompt was sent here to be prefilled."""
        self.missing_tokens = SHARE_MEMORY * self.missing_tokens + missing
        self.prompt_tokens = SHARE_MEMORY * self.prompt_tokens + prompt_len


class Fleet:
    """Pods by id and by slot. `now` is any monotonic clock, in seconds."""

    def __init__(self, *, in_flight_ttl_s: float, stale_after_s: float) -> None:
        self.index = PrefixIndex()
        self.in_flight = InFlight(in_flight_ttl_s / 2)  # a claim lives one to two of its periods
        self.pods: dict[str, Pod] = {}
        self._stale_after_s = stale_after_s
        self._names: list[str] = []
        """Slot -> pod id, "" where free."""
        self._free: list[int] = []
        self._models: list[str] = []
        self._pairs: defaultdict[int, dict[int, float]] = defaultdict(dict)
        self._pair_names: dict[tuple[str, str], float] = {}
        self._columns = {f.name: _column(f.name, 0) for f in COLUMNS}
        self._model = np.zeros(0, np.int32)
        self._busy_until = np.zeros(0)
        self._heard = np.zeros(0)
        self._trust = np.zeros(0)
        self._measured = {name: np.zeros(0, bool) for name in RATES}

    def __len__(self) -> int:
        return len(self.pods)

    # ---- pods come and go

    def connect(self, model: PodModel, now: float) -> Pod:
        """A pod said what it serves. Another incarnation than before has an empty cache."""
        pod = self.pods.get(model.pod)
        if pod is not None and pod.incarnation != model.incarnation:
            self.lose(model.pod)
            pod = None
        if pod is None:
            pod = Pod(model.pod, self._take_slot(model.pod), model.incarnation)
            self.pods[model.pod] = pod
            self._reset(pod.slot, model)
        self._heard[pod.slot] = now
        return pod

    def lose(self, pod_id: str) -> None:
        """The pod is gone, and its cache with it."""
        pod = self.pods.pop(pod_id, None)
        if pod is None:
            return
        self.index.clear(pod.slot)
        self.in_flight.forget(pod.slot)
        self._columns["serving"][pod.slot] = False
        for measured in self._measured.values():
            measured[pod.slot] = False
        self._names[pod.slot] = ""
        self._free.append(pod.slot)
        self._pairs.pop(pod.slot, None)
        for rates in self._pairs.values():
            rates.pop(pod.slot, None)

    def disconnect(self, pod_id: str) -> None:
        """The connection broke: no requests for now, but the cache may still be there."""
        pod = self.pods.get(pod_id)
        if pod is not None:
            self._columns["serving"][pod.slot] = False

    def forget_silent(self, pod_id: str, now: float, after_s: float) -> None:
        """Lose the pod if it has been silent for so long."""
        pod = self.pods.get(pod_id)
        if pod is not None and now - self._heard[pod.slot] > after_s:
            self.lose(pod_id)

    def states(self, now: float) -> dict[str, int]:
        """How many pods take requests, are suspected to hang, or take none."""
        slots = [pod.slot for pod in self.pods.values()]
        serving = self._columns["serving"][slots]
        silent = now - self._heard[slots] > self._stale_after_s
        return {
            "serving": int(np.count_nonzero(serving & ~silent)),
            "suspect": int(np.count_nonzero(serving & silent)),
            "away": int(np.count_nonzero(~serving)),
        }

    def serving(self) -> dict[str, int]:
        """Incarnation of each pod that takes requests, by its own last word."""
        taking = self._columns["serving"]
        return {name: pod.incarnation for name, pod in self.pods.items() if taking[pod.slot]}

    # ---- reports

    def work_of(self, pod_id: str) -> tuple[float, float, float]:
        """Streams of a pod, seconds of its queued prefill, share of its blocks with content."""
        slot, columns = self.pods[pod_id].slot, self._columns
        free = columns["blocks_free"][slot] / columns["num_blocks"][slot]
        return float(columns["running"][slot]), float(columns["wait_s"][slot]), float(1.0 - free)

    def hear(self, pod_id: str, now: float) -> None:
        """Any frame of the pod arrived."""
        pod = self.pods.get(pod_id)
        if pod is not None:
            self._heard[pod.slot] = now

    def report(self, pod_id: str, load: LoadReport, now: float) -> None:
        """The pod's own word on its load; replaces what was assumed, but for the latest picks."""
        pod = self.pods.get(pod_id)
        if pod is None:
            return
        slot, c = pod.slot, self._columns
        while pod.picks and pod.picks[0].at < now - REPORT_LAG_S:
            pod.picks.popleft()
        for name in RATES:
            self._measure(slot, name, getattr(load, name))
        uncached = load.waiting_tokens * pod.uncached_share + load.prefilling_tokens
        queued_s = uncached / c["prefill_tokens_per_s"][slot]
        self._busy_until[slot] = now + queued_s + sum(p.prefill_s for p in pod.picks)
        c["running"][slot] = load.running + load.waiting + sum(p.streams for p in pod.picks)
        c["blocks_free"][slot] = load.blocks_free
        c["blocks_cached"][slot] = load.blocks_cached
        waiting = load.waiting_tokens * pod.uncached_share / c["block_size"][slot]
        self._spend_blocks(slot, waiting + sum(p.blocks for p in pod.picks))
        c["prefill_weight"][slot] = load.prefill_weight
        c["decode_weight"][slot] = load.decode_weight
        c["serving"][slot] = not load.draining
        self._heard[slot] = now
        for peer, rate in load.transfer_rates:
            self._pair_names[peer, pod_id] = rate
            if (other := self.pods.get(peer)) is not None:
                self._pairs[other.slot][slot] = rate

    def _measure(self, slot: int, name: str, value: float) -> None:
        """A rate that a pod measured, 0 for not yet. Pods of the same model that have measured none
        are taken to be as fast: a common prior would draw requests to them or away."""
        if value <= 0:
            return
        self._columns[name][slot] = value
        if not self._measured[name][slot]:
            self._measured[name][slot] = True
            alike = (self._model == self._model[slot]) & ~self._measured[name]
            self._columns[name][alike] = value

    # ---- decisions

    def endpoints(self, query: RouteQuery, now: float) -> Endpoints:
        """Everything about all pods that a decision on the query needs.

        The arrays are the fleet's own where they need no change: use it up before the next call.
        """
        c = self._columns
        silent = now - self._heard > self._stale_after_s
        columns = c | {
            "suspect": silent,
            "wait_s": np.maximum(self._busy_until - now, 0.0),
            "cached_tokens": self.cached_tokens(query, silent, now),
        }
        return Endpoints(
            pods=self._names,
            model_names=self._models,
            model=self._model,
            pair_bytes_per_s=self._pairs,
            **columns,
        )

    def cached_tokens(self, query: RouteQuery, silent: NDArray[np.bool], now: float) -> Floats:
        """Leading prompt tokens each pod is expected to have cached when the request arrives.

        A silent pod's cache counts as unknown, a drifted one's as its trust says; what this router
        itself sent there lately is believed in any case. The last token is always computed: its
        logits are asked for.
        """
        keys, slots = query.keys, len(self._names)
        known = self.index.depths(keys, slots) * self._trust
        known[silent] = 0.0
        blocks = np.maximum(known, self.in_flight.depths(keys, slots, now))
        size = self._columns["block_size"]
        usable = np.floor((query.prompt_len - 1) / size)
        cached: Floats = np.minimum(np.floor(blocks), usable) * size
        return cached

    def place_decode(self, slot: int, query: RouteQuery, cached: float, now: float) -> None:
        """The request decodes here: a stream, and its blocks."""
        size = self._columns["block_size"][slot]
        blocks = (query.prompt_len - cached + query.expected_output) / size
        self._columns["running"][slot] += 1
        self._spend_blocks(slot, blocks)
        self._note(slot, _Pick(now, 0.0, 1.0, blocks))

    def place_prefill(self, slot: int, query: RouteQuery, cached: float, now: float) -> None:
        """The request is prefilled here."""
        missing = query.prompt_len - cached
        duration = missing / self._columns["prefill_tokens_per_s"][slot]
        self._busy_until[slot] = max(self._busy_until[slot], now) + duration
        self._note(slot, _Pick(now, float(duration), 0.0, 0.0))
        self.pods[self._names[slot]].note_share(missing, query.prompt_len)

    # ---- cache

    def stored(self, pod: Pod, hashes: Sequence[bytes]) -> None:
        """The pod holds exactly these blocks: a snapshot."""
        self.index.replace(pod.slot, hashes)
        pod.resync = False
        self._trust[pod.slot] = 1.0

    def distrust(self, pod: Pod) -> None:
        """What is known of the pod's cache is wrong; until it is asked for again it counts half."""
        pod.resync = True
        self._trust[pod.slot] = min(self._trust[pod.slot], MIN_TRUST)

    def observe(self, pod_id: str, predicted: float, actual: float, now: float) -> None:
        """A request found `actual` cached tokens where `predicted` were expected.

        More than expected is no drift: another router's request may have brought them. Less may
        also be a cache so small that blocks leave it before the request comes; asking for the
        cache again does not help then, so it is not done often.
        """
        pod = self.pods.get(pod_id)
        if pod is None or predicted <= 0:
            return
        seen = min(actual / predicted, 1.0)
        trust = TRUST_MEMORY * self._trust[pod.slot] + (1 - TRUST_MEMORY) * seen
        self._trust[pod.slot] = 1.0 if trust > FULL_TRUST else trust
        if trust < MIN_TRUST and now >= pod.next_drift_resync:
            pod.resync, pod.next_drift_resync = True, now + DRIFT_PERIOD_S

    def trust(self, pod: Pod) -> float:
        """Share of the expected hits that the pod has; 1 while nothing speaks against it."""
        return float(self._trust[pod.slot])

    # ---- columns

    def _note(self, slot: int, pick: _Pick) -> None:
        picks = self.pods[self._names[slot]].picks
        while picks and picks[0].at < pick.at - REPORT_LAG_S:
            picks.popleft()
        picks.append(pick)

    def _spend_blocks(self, slot: int, blocks: float) -> None:
        """Free blocks go first, then cached ones."""
        c = self._columns
        from_free = min(blocks, c["blocks_free"][slot])
        c["blocks_free"][slot] -= from_free
        c["blocks_cached"][slot] -= blocks - from_free

    def _take_slot(self, pod_id: str) -> int:
        if not self._free:
            self._widen()
        slot = self._free.pop()
        self._names[slot] = pod_id
        return slot

    def _widen(self) -> None:
        """Twice as many slots."""
        old = len(self._names)
        count = max(2 * old, FIRST_SLOTS)
        added = count - old
        self._names += [""] * added
        self._free += range(count - 1, old - 1, -1)
        self._columns = {
            name: np.concatenate((values, _column(name, added)))
            for name, values in self._columns.items()
        }
        self._model = np.concatenate((self._model, np.zeros(added, np.int32)))
        self._busy_until = np.concatenate((self._busy_until, np.zeros(added)))
        self._heard = np.concatenate((self._heard, np.zeros(added)))
        self._trust = np.concatenate((self._trust, np.ones(added)))
        self._measured = {
            name: np.concatenate((values, np.zeros(added, bool)))
            for name, values in self._measured.items()
        }

    def _reset(self, slot: int, model: PodModel) -> None:
        """A new pod: until it reports, priors, or what others of its model measured."""
        for name, values in self._columns.items():
            values[slot] = _PRIORS[name]
        c = self._columns
        c["block_size"][slot] = model.block_size
        c["bytes_per_token"][slot] = model.block_bytes / model.block_size
        c["num_blocks"][slot] = c["blocks_free"][slot] = model.num_blocks
        c["max_seqs"][slot] = model.max_num_seqs
        c["kv_layout"][slot] = model.kv_layout
        if model.model not in self._models:
            self._models.append(model.model)
        self._model[slot] = self._models.index(model.model)
        for name, measured in self._measured.items():
            alike = c[name][measured & (self._model == self._model[slot])]
            if len(alike):
                c[name][slot] = np.median(alike)
        self._busy_until[slot] = 0.0
        self._trust[slot] = 1.0
        for (peer, receiver), rate in self._pair_names.items():
            if model.pod in (peer, receiver) and peer in self.pods and receiver in self.pods:
                self._pairs[self.pods[peer].slot][self.pods[receiver].slot] = rate


RATES = ("prefill_tokens_per_s", "itl_s", "itl_slope_s")
"""Columns that pods measure."""
_NEW = Endpoint(pod="", serving=False)
_PRIORS: dict[str, bool | float] = {f.name: getattr(_NEW, f.name) for f in COLUMNS}


def _column(name: str, length: int) -> NDArray[Any]:
    prior = _PRIORS[name]
    return np.full(length, prior, bool if isinstance(prior, bool) else np.float64)
