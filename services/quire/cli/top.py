"""`quire top ADDRESS...`: what workers do, once a second, until interrupted.

On a terminal the lines are rewritten in place; where there is none, or a dumb one, each picture
follows the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from quire.cli.table import table
from quire.cli.workers import WorkersConfig
from quire.config.base import check_fields
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, UsageError, parse
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.cli.follow import Follower, Row

FIRST_PICTURE_S = 10.0
"""--once waits no longer for workers that do not answer."""
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True, kw_only=True)
class TopConfig:
    """How it is shown."""

    interval: float = option(1.0, "output")
    """Seconds between two pictures."""
    once: bool = option(False, "output")
    """One picture, when every worker has been heard or 10 s have passed; hits and latencies since
    the workers' start."""
    json: bool = option(False, "output")
    """A JSON object per picture, each on a line."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.1 <= self.interval <= 3600:
            raise ValueError(f"interval must be 0.1 to 3600 seconds, not {self.interval}")


COMMAND = Command(
    prog="quire top",
    summary="Show what workers do, by their gRPC addresses: requests, KV cache, speed, transfers.",
    owners=(WorkersConfig, TopConfig, ClusterConfig),
    positional="address",
    reads_environment=True,
    epilog="Rates, hits and latencies are of the last 10 seconds. Ctrl-C ends it.",
)
_HEADER = (
    "POD", "ROLE", "STATE", "RUN", "WAIT", "KV%", "HIT%", "IN tok/s", "OUT tok/s",
    "TTFT p50/p95 ms", "ITL p50/p95 ms", "SENT GB/s", "RECV GB/s",
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Show until interrupted, or once; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    workers, config = resolved.get(WorkersConfig), resolved.get(TopConfig)
    if not workers.named:
        raise UsageError(COMMAND.prog, "which workers? Give their gRPC addresses: HOST:PORT ...")
    screen = _Screen(config)
    with contextlib.suppress(KeyboardInterrupt), screen:
        asyncio.run(watch(workers, resolved.get(ClusterConfig), config, screen))
    return 0


async def watch(
    workers: WorkersConfig, cluster: ClusterConfig, config: TopConfig, screen: _Screen
) -> None:
    """Follow every worker and draw what they say."""
    from quire.cli.follow import Follower
    from quire.cluster.rpc import Cluster

    reaching = Cluster(cluster)
    followers = [Follower(name, address, reaching) for name, address in workers.named.items()]
    tasks = [asyncio.create_task(follower.run(config.interval)) for follower in followers]
    try:
        if config.once:
            await _first_picture(followers)
            screen.draw([follower.row(since_start=True) for follower in followers])
        while not config.once:
            ended, _ = await asyncio.wait(
                tasks, timeout=config.interval, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended:
                task.result()  # only a mistake of ours ends one
            screen.draw([follower.row(since_start=False) for follower in followers])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_picture(followers: Sequence[Follower]) -> None:
    """Wait until rates are known of every worker that can be reached."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_PICTURE_S):
            # what each is waited for comes over several calls: polled
            while not all(_is_known(follower) for follower in followers):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def _is_known(follower: Follower) -> bool:
    row = follower.row(since_start=True)
    return follower.num_pages >= 2 or (follower.is_reached and row.running is None)


class _Screen:
    """Where pictures go. A context manager: a terminal is left as it was."""

    def __init__(self, config: TopConfig) -> None:
        self._config = config
        smart = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._in_place = smart and not (config.once or config.json)

    def __enter__(self) -> _Screen:
        if self._in_place:
            sys.stdout.write(ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_place:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()

    def draw(self, rows: Sequence[Row]) -> None:
        """Show one picture."""
        if self._config.json:
            pods = [asdict(row) for row in rows]
            print(json.dumps({"time": round(time.time(), 3), "pods": pods}))
        elif self._in_place:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns] for line in picture(rows)][: size.lines - 1]
            body = "".join(f"{line}{END_OF_LINE}\n" for line in lines)
            sys.stdout.write(HOME + body + END_OF_SCREEN)
        else:
            print("\n".join(picture(rows)), end="\n" if self._config.once else "\n\n")
        sys.stdout.flush()


def picture(rows: Sequence[Row]) -> Iterator[str]:
    """The lines to show."""
    ready = sum(row.state == "ready" for row in rows)
    tokens = sum(row.output_tokens_per_s or 0.0 for row in rows)
    running = sum(row.running or 0 for row in rows)
    waiting = sum(row.waiting or 0 for row in rows)
    models = ", ".join(sorted({row.model for row in rows if row.model})) or "no model yet"
    yield (
        f"{time.strftime('%H:%M:%S')}  {models}: {ready} of {len(rows)} ready, "
        f"{running} running, {waiting} waiting, {tokens:.0f} tok/s out"
    )
    yield ""
    yield from table([_HEADER, *map(_cells, rows)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.pod,
        row.role or "-",
        row.state,
        _number(row.running),
        _number(row.waiting),
        _number(row.kv_ratio, 100),
        _number(row.hit_ratio, 100),
        _number(row.prompt_tokens_per_s),
        _number(row.output_tokens_per_s),
        f"{_number(row.ttft_p50_s, 1e3)}/{_number(row.ttft_p95_s, 1e3)}",
        f"{_number(row.itl_p50_s, 1e3, 1)}/{_number(row.itl_p95_s, 1e3, 1)}",
        _number(row.sent_gb_per_s, digits=3),
        _number(row.received_gb_per_s, digits=3),
    )


def _number(value: float | None, scale: float = 1.0, digits: int = 0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
