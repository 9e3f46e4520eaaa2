"""Pages of metrics: what workers hold, and what happened to their transfers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RELEASED_S = 40.0


def samples(pages: Iterable[str], start: str, *parts: str) -> dict[str, float]:
    """Samples whose line starts so and has all the parts, by name and labels."""
    lines = (line for page in pages for line in page.splitlines())
    mine = [x for x in lines if x.startswith(start) and all(part in x for part in parts)]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in mine}


def total(pages: Iterable[str], start: str, *parts: str) -> float:
    return sum(samples(pages, start, *parts).values())


def wait_released(pages: Callable[[], list[str]], num_workers: int) -> None:
    """Until all workers answer, and none has a block that it owns, has promised to a prompt, or
    keeps out of use because a peer may still write to it."""

    def held() -> dict[str, float] | None:
        read = pages()
        owned = samples(read, "quire_kv_blocks{", 'state="owned"')
        promised = samples(read, "quire_kv_promised_blocks")
        if not len(owned) == len(promised) == num_workers:
            return None  # one did not answer in time
        return owned | promised | samples(read, "quire_kv_quarantined_bytes")

    def is_released() -> bool:
        nonlocal last
        last = held()
        return last is not None and not any(last.values())

    last: dict[str, float] | None = None
    try:
        wait_until(is_released, "no block is held", RELEASED_S)
    except AssertionError as error:
        error.add_note(f"held: {last}")
        raise


class Growth:
    """What counters grew by, as far as looked at: one starts over with the process that counts."""

    def __init__(self, pages: Callable[[], list[str]], *which: str) -> None:
        """Samples that `which` matches as in `samples`."""
        self._pages, self._which = pages, which
        self._last = samples(pages(), *which)
        self.sum = 0.0

    def look(self) -> float:
        now = samples(self._pages(), *self._which)
        for name, value in now.items():
            last = self._last.get(name, 0.0)
            self.sum += value - last if value >= last else value
        self._last |= now
        return self.sum


class FailedTransfers(Growth):
    """KV transfers that ended in any other way than a commit."""

    def __init__(self, pages: Callable[[], list[str]]) -> None:
        super().__init__(lambda: [_failed(page) for page in pages()], "quire_kv_transfers_total")


def _failed(page: str) -> str:
    return "\n".join(x for x in page.splitlines() if 'outcome="committed"' not in x)
