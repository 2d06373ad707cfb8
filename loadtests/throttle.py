"""A slow wire: a proxy on loopback that passes at most so many bytes a second each way.

`rate` may change while connections are open.  All connections share one wire, as they do on a network card;
each direction has its own.
"""

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self, TypeAlias

Target = tuple[str, int] | str  # host and port, or the path of a unix socket
Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
UNLIMITED = float("inf")
_SLICE_SECONDS = 0.02  # of the rate that is passed at once: small enough to be smooth
_LARGEST_BYTES, _SMALLEST_BYTES = 256 << 10, 1 << 10
_AHEAD_BYTES = 64 << 10  # what the proxy takes in before the other end has room: little, as on a real wire


class Throttle:
    """`with Throttle(target, 10e6) as slow:` then connect to slow.port instead of to the target."""

    def __init__(self, target: Target, bytes_per_second: float = UNLIMITED) -> None:
        self.rate = bytes_per_second
        self.passed = [0, 0]  # bytes to the target, and back
        self._target = target
        self._free_at = [0.0, 0.0]
        self._served: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="throttle", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.port = listening.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_AHEAD_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    async def _stop(self) -> None:
        self._server.close()
        for task in self._served:
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)

    async def _accept(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        task.add_done_callback(self._served.discard)
        try:
            await self.serve(reader, writer)
        except (OSError, asyncio.CancelledError):  # an end is gone, or we are told to stop
            return
        finally:
            writer.transport.abort()

    async def serve(self, reader: Reader, writer: Writer) -> None:
        """One client, until either end hangs up.  Raises OSError when the target cannot be reached."""
        there, back = await self.connect()
        pumps = [
            asyncio.ensure_future(self._pump(reader, back, 0)),
            asyncio.ensure_future(self._pump(there, writer, 1)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            back.transport.abort()

    async def connect(self) -> tuple[Reader, Writer]:
        if isinstance(self._target, str):
            return await asyncio.open_unix_connection(self._target, limit=_AHEAD_BYTES)
        return await asyncio.open_connection(*self._target, limit=_AHEAD_BYTES)

    async def _pump(self, source: Reader, sink: Writer, way: int) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(self._slice()):
                await self._turn(len(data), way)
                self.passed[way] += len(data)
                sink.write(data)
                await sink.drain()

    async def _turn(self, size: int, way: int) -> None:
        now = self._loop.time()
        self._free_at[way] = max(now, self._free_at[way]) + size / self.rate
        if self._free_at[way] > now:
            await asyncio.sleep(self._free_at[way] - now)

    def _slice(self) -> int:
        return int(min(_LARGEST_BYTES, max(_SMALLEST_BYTES, self.rate * _SLICE_SECONDS)))
