"""Signs of life while a client waits for a stream, so that no proxy in between takes silence for death."""

import asyncio
from collections.abc import Awaitable, Callable

COMMENT = b": keepalive\n\n"  # clients skip it: HTML Standard, 9.2 "Server-sent events"


class Keepalive:
    """Calls `say` every `seconds` until stopped.  There is no task before the first time: most requests are
    answered sooner.  REQUIRES: stop() on every way out."""

    __slots__ = ("_say", "_seconds", "_task", "_timer")

    def __init__(self, say: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._say, self._seconds = say, seconds
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(seconds, self._begin)

    async def stop(self) -> None:
        """Once this returns nothing more is said, and nothing is half said."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._talk())

    async def _talk(self) -> None:
        while True:
            await self._say()
            await asyncio.sleep(self._seconds)
