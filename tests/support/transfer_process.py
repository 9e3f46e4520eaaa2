"""A `Side` in a process of its own, to be killed and stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal

from transfers import Side

from quire.transfer.state import Delivered, Ended, Released

_spawn = multiprocessing.get_context("spawn")


def _serve(pipe, options):
    with contextlib.suppress(EOFError, BrokenPipeError), Side(**options) as side:
        pipe.send(side.peer)
        while True:
            verb, arguments, named = pipe.recv()
            if verb == "told":
                pipe.send(side.told())
            elif verb in ("state", "is_copying", "let_copies_through"):
                pipe.send(getattr(side, verb)(*arguments))
            elif verb == "rows":
                pipe.send(side.pool[list(arguments)].copy())
            else:
                pipe.send(getattr(side.endpoint, verb)(*arguments, **named))


class RemoteSide:
    """Verbs of its endpoint as methods; the rest as on `Side`. With gated memory also `is_copying`
    and `let_copies_through`."""

    def __init__(self, **options):
        self._pipe, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        assert self._pipe.poll(30), "the process did not start"
        self.peer = self._pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self._pipe.close()

    @property
    def endpoint(self):
        return self

    def __getattr__(self, verb):
        def call(*arguments, **named):
            self._pipe.send((verb, arguments, named))
            assert self._pipe.poll(20), f"no answer to {verb}"
            return self._pipe.recv()

        return call

    def rows(self, slots):
        self._pipe.send(("rows", tuple(slots), {}))
        return self._pipe.recv()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)


def returned(events, ref):
    """Every block that came back, in either way."""
    slots = [e.slot for e in events if isinstance(e, Delivered) and e.ref == ref]
    slots += [s for e in events if isinstance(e, Released) and e.ref == ref for s in e.slots]
    return sorted(slots)


def ended(events, ref):
    return next((e for e in events if isinstance(e, Ended) and e.ref == ref), None)
