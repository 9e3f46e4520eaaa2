"""Questions of the event loop to the engine's thread."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop

T = TypeVar("T")

ENGINE_TIMEOUT_S = 10.0
"""For the engine to come to the end of its step."""


async def on_engine(
    loop: EngineLoop, function: Callable[[Engine], T], timeout_s: float = ENGINE_TIMEOUT_S
) -> T:
    """What a function returns that is called on the engine's thread, between two steps.

    Raises TimeoutError; the function may still be called then, before whatever is asked later.
    """
    here = asyncio.get_running_loop()
    future: asyncio.Future[T] = here.create_future()

    def resolve(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def call(engine: Engine) -> None:
        here.call_soon_threadsafe(resolve, function(engine))

    loop.call(call)
    async with asyncio.timeout(timeout_s):
        return await future
