"""A gateway's line to one server of the chunk index: connected ahead of time, shared, watched, made anew."""

import asyncio
import contextlib
import logging
import math
from collections import deque
from typing import Any, cast

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError

log = logging.getLogger(__name__)

MISSES_TO_SUSPECT = 3
PROBE_SECONDS = 1.0  # a connection that cannot answer in this time is given up
BACKOFF_SECONDS = (0.05, 1.0)


class Line:
    """One connection shared by every question of a process.

    Questions are pipelined and answered in order; nobody waits for a pool, no handshake happens inside a
    deadline, and an answer that comes too late is dropped instead of costing the connection.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._reader = asyncio.create_task(self._read(), name="cairn-index-line")
        self.broken = asyncio.Event()

    async def ask(self, *command: bytes | str | int, asking: bool = False) -> Any:
        """`asking`: a Cluster's node is to answer for a slot that is still moving to it.  Raises RedisError,
        OSError; cancel it freely."""
        if not self._connection.is_connected:  # redis-py would dial again, under the live reader
            self._give_up(redis.exceptions.ConnectionError("connection to the index hung up"))
        if self.broken.is_set():
            raise redis.exceptions.ConnectionError("connection to the index is closed")
        loop = asyncio.get_running_loop()
        packed = self._connection.pack_command(*command)
        if asking:
            self._waiting.append(loop.create_future())  # nobody waits for its OK
            packed = [*self._connection.pack_command("ASKING"), *packed]
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(answer)
        try:
            await self._connection.send_packed_command(packed, check_health=False)
        except BaseException:
            answer.cancel()  # nobody waits for it any more
            raise
        return await answer

    async def _read(self) -> None:
        try:
            while True:
                try:
                    answer = await self._connection.read_response(timeout=math.inf)
                except redis.exceptions.ResponseError as exc:
                    _settle(self._waiting.popleft(), exc)
                else:
                    _settle(self._waiting.popleft(), answer)
        except (RedisError, OSError) as exc:
            self._give_up(exc)
        except Exception as exc:  # noqa: BLE001  a reply too many, a parser that stumbles: believe no more
            self._give_up(redis.exceptions.ConnectionError(f"connection out of step: {exc!r}"))

    def _give_up(self, exc: BaseException) -> None:
        self.broken.set()
        while self._waiting:
            _settle(self._waiting.popleft(), exc)

    async def close(self) -> None:
        """Never raises but when cancelled itself."""
        self._reader.cancel()
        self._give_up(redis.exceptions.ConnectionError("connection to the index is closed"))
        with contextlib.suppress(Exception):
            await self._connection.disconnect(nowait=True)
        await asyncio.wait((self._reader,))


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # its deadline passed
        return
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class Node:
    """One server: its line and its breaker.  REQUIRES: used from one event loop.

    After three misses in a row it is not `up` until it has answered again; `changed` is set whenever that
    turns.
    """

    def __init__(self, client: redis.asyncio.Redis, script: str, changed: asyncio.Event) -> None:
        self._client, self._script, self._changed = client, script, changed
        self._line: Line | None = None
        self._sha = ""
        self._misses = 0
        self._suspect = asyncio.Event()
        self._up = False
        self._keeper = asyncio.create_task(self._keep(), name="cairn-index-node")

    @property
    def up(self) -> bool:
        return self._up

    async def ask(self, *command: bytes | str | int) -> Any:
        """Raises RedisError, OSError."""
        return await self._here().ask(*command)

    async def evaluate(self, name: bytes, argument: bytes, asking: bool = False) -> list[Any]:
        """The script's answer.  Raises RedisError, OSError."""
        line = self._here()
        try:
            reply = await line.ask("EVALSHA", self._sha, 1, name, argument, asking=asking)
        except NoScriptError:  # somebody ran SCRIPT FLUSH
            reply = await line.ask("EVAL", self._script, 1, name, argument, asking=asking)
        self._misses = 0
        return cast(list[Any], reply)

    def missed(self) -> None:
        """A deadline passed without an answer."""
        self._misses += 1
        if self._misses >= MISSES_TO_SUSPECT:
            self._turn(up=False)
            self._suspect.set()

    async def close(self) -> None:
        self._keeper.cancel()
        await asyncio.wait((self._keeper,))

    def _here(self) -> Line:
        if self._line is None or not self._up:
            raise redis.exceptions.ConnectionError("no connection to the index")
        return self._line

    def _turn(self, up: bool) -> None:
        if self._up != up:
            self._up = up
            self._changed.set()

    async def _keep(self) -> None:
        """Own the line: connect, watch, give up, connect again.  Whatever goes wrong costs a line at most."""
        delay = BACKOFF_SECONDS[0]
        while True:
            try:
                line = await self._connected()
            except Exception as exc:  # noqa: BLE001  the next try may fare better
                log.debug("chunk index: %r", exc)
            else:
                try:
                    while await self._answers(line):
                        delay = BACKOFF_SECONDS[0]
                        self._line = line
                        self._misses = 0
                        self._suspect.clear()
                        self._turn(up=True)
                        await _first(self._suspect, line.broken)
                        self._turn(up=False)
                finally:
                    self._turn(up=False)
                    self._line = None
                    await line.close()
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_SECONDS[1])

    async def _connected(self) -> Line:
        """Raises what redis-py raises, and TimeoutError."""
        pool = self._client.connection_pool
        connection = cast(AbstractConnection, pool.make_connection())  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]
            return Line(connection)
        except BaseException:
            with contextlib.suppress(Exception):
                await connection.disconnect(nowait=True)
            raise

    async def _answers(self, line: Line) -> bool:
        """Whether the line works; (re)loads the script, which doubles as the PING."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                self._sha = (await line.ask("SCRIPT", "LOAD", self._script)).decode()
        except Exception as exc:  # noqa: BLE001  also an answer that is no digest
            log.debug("chunk index: %r", exc)
            return False
        return True


async def _first(*events: asyncio.Event) -> None:
    """Return when any of the events is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
