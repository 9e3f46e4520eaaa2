"""One engine in a process of its own, stopped by signal while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from loadtest.compare.environments import ENGINES, PeerMissing, environ_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.compare.environments import Peer

LOAD_S = 900
ANSWER_S = 300
END_S = 20
STEADY_S = 0.2
"""After a process goes on: its threads come back, caches are warm again with the first work."""


@dataclass(frozen=True)
class Answer:
    """What one call of an engine gave."""

    seconds: float
    output_tokens: int
    token_ids: list[list[int]] | None


class Frozen:
    """A process group that can be stopped and continued. Engines spin: an idle one costs cores."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._is_frozen = False

    def freeze(self) -> None:
        """Take it off the cores."""
        if not self._is_frozen:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self._is_frozen = True

    def thaw(self) -> None:
        """Let it run."""
        if self._is_frozen:
            os.killpg(self.process.pid, signal.SIGCONT)
            self._is_frozen = False
            time.sleep(STEADY_S)

    def end(self) -> None:
        """End all of the group."""
        self.thaw()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(END_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process.wait(END_S)


class EngineProcess:
    """An engine that answers `ask`. Starts on construction; `wait_ready` before the first call."""

    def __init__(self, peer: Peer, model: Path, dtype: str, cache: Path, threads: int) -> None:
        self.peer = peer
        self.name = peer.name
        receiver, sender = os.pipe()
        self._answers: IO[str] = os.fdopen(receiver)
        command = [str(peer.python(cache)), str(ENGINES / peer.script), str(model), dtype]
        command += [*peer.flags, *([str(threads)] if peer.needs_gguf else [])]
        self.log = cache / f"{peer.name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(sender,),
                env=environ_of(peer, cache, threads) | {"COMPARE_ANSWERS": str(sender)},
                start_new_session=True, text=True,
            )  # fmt: skip
        os.close(sender)
        self.group = Frozen(self._process)

    def wait_ready(self) -> None:
        """Wait until it is loaded. Raises PeerMissing when it is not."""
        self.name = str(self._read(LOAD_S)["ready"])

    def ask(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, tokens: bool = False
    ) -> Answer:
        """Generate greedily, exactly as many tokens as asked for. Raises PeerMissing."""
        uneven = self.peer.name == "transformers-continuous"
        asked = {"prompts": prompts, "output_lens": output_lens, "tokens": tokens, "uneven": uneven}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._read(ANSWER_S)
        if answer["error"]:
            raise PeerMissing(f"{self.peer.name}: {answer['error']}")
        return Answer(answer["seconds"], answer["output_tokens"], answer["token_ids"])

    def close(self) -> None:
        """End it."""
        self.group.end()
        self._answers.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _read(self, patience_s: float) -> Any:
        ready, _, _ = select.select([self._answers], [], [], patience_s)
        line = self._answers.readline() if ready else ""
        if not line:
            why = "ended" if ready else f"was silent for {patience_s} s"
            raise PeerMissing(f"{self.peer.name} {why}; see {self.log}")
        return json.loads(line)
