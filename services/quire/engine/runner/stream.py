"""Work done in order on a thread of its own: a CPU's counterpart of a CUDA stream."""

from __future__ import annotations

import queue
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_Jobs = queue.SimpleQueue["Callable[[], None] | None"]


class HostStream:
    """Jobs run one after the other until the stream is garbage; native calls in them release the
    interpreter, so that whoever gave the jobs goes on meanwhile."""

    def __init__(self, name: str) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        # the thread knows the queue alone: it keeps nothing alive that a job does not
        threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], T]) -> Callable[[], T]:
        """Queue a job. What is returned waits for it, and returns or raises what it does."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised where the job is waited for
                future.set_exception(error)

        self._jobs.put(run)
        return future.result


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
