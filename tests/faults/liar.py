"""A wire to a real server that can be told to answer in the server's place, with anything."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from loadtests.throttle import Reader, Throttle, Writer

HANG_UP = b"<hang up>"


class Liar(Throttle):
    """`lies`: command name → reply, "" for all others; an empty reply is silence.  None: the truth."""

    lies: Mapping[str, bytes] | None = None

    def tell(self, lies: Mapping[str, bytes] | None) -> None:
        """From now on.  Whoever is connected is hung up on, so that all hear the same."""
        self.lies = lies
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()

    async def _hang_up(self) -> None:
        served = list(self._served)
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)

    async def serve(self, reader: Reader, writer: Writer) -> None:
        if self.lies is None:
            await super().serve(reader, writer)
            return
        with suppress(asyncio.IncompleteReadError):
            while True:
                name = await _command(reader)
                reply = self.lies.get(name, self.lies.get("", b""))
                if reply == HANG_UP:
                    return
                writer.write(reply)
                await writer.drain()


async def _command(reader: Reader) -> str:
    """The name of the next command; its arguments are read and forgotten."""
    name = b""
    for _ in range(int((await reader.readline())[1:] or b"0")):
        size = int((await reader.readline())[1:])
        argument = (await reader.readexactly(size + 2))[:-2]
        name = name or argument
    if not name:
        raise asyncio.IncompleteReadError(b"", 1)
    return name.decode().upper()
