"""The other processes of this gateway: each answers a few questions of the others over a unix socket.

The sockets lie beside the load board, in a folder only this user may enter.  A question is one line of JSON,
a name and its arguments; the answer is JSON up to the end of the connection.  Who does not answer within a
second is left out.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0
Answer = Callable[..., Awaitable[Any]]


class Siblings:
    """REQUIRES: used from one event loop; no two live processes have the same `number`."""

    def __init__(self, folder: Path | None, number: int = 0) -> None:
        """Without a folder: nobody."""
        self._folder = folder
        self._own = folder / f"{number}.sock" if folder else None
        self._answers: Mapping[str, Answer] = {}

    @contextlib.asynccontextmanager
    async def answered(self, answers: Mapping[str, Answer]) -> AsyncIterator[None]:
        """The others are, for the body of the `with`.  Raises OSError."""
        self._answers = answers
        if self._own is None:
            yield
            return
        self._own.unlink(missing_ok=True)  # of one with our number that died
        server = await asyncio.start_unix_server(self._heard, self._own)
        try:
            yield
        finally:
            server.close()
            self._own.unlink(missing_ok=True)

    async def ask(self, name: str, *arguments: Any) -> list[Any]:
        """What each of the others answers."""
        if self._folder is None:
            return []
        others = [path for path in sorted(self._folder.glob("*.sock")) if path != self._own]
        asked = await asyncio.gather(*(self._ask(path, [name, *arguments]) for path in others))
        return [answer for answer in asked if answer is not None]

    async def _ask(self, path: Path, question: list[Any]) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(path)
                with contextlib.closing(writer):
                    writer.write(msgspec.json.encode(question) + b"\n")
                    return msgspec.json.decode(await reader.read())
        except (OSError, TimeoutError, msgspec.DecodeError) as exc:
            log.debug("%s does not answer: %r", path.name, exc)
            return None

    async def _heard(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            name, *arguments = msgspec.json.decode(await reader.readline())
            writer.write(msgspec.json.encode(await self._answers[name](*arguments)))
            await writer.drain()


NO_SIBLINGS = Siblings(None)
