"""The gateways' side of the chunk index: who holds how much of this prompt, and who is alive.

Trouble is mapped to IndexDown here and nowhere else; the router then falls back to its ring.
"""

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from cacheengine.errors import IndexDown
from cacheengine.index_schema import FLEET, Depths, Lease, WorkerInfo, chunk_name, holder_of, lease_name
from cacheengine.keys import ChunkKey, Namespace
from cacheengine.redis_url import async_client

log = logging.getLogger(__name__)

MAX_LOOKUP_KEYS = 512  # 131,072 tokens in chunks of 256; the rest of a longer prompt is not asked for
MAX_FLEET = 1024
MISSES_TO_SUSPECT = 3
PROBE_SECONDS = 1.0  # a connection that cannot answer PING in this time is given up
BACKOFF_SECONDS = (0.05, 1.0)
FLEET_SECONDS = 1.0
_LATE_TURNS = 5  # of the loop: poll, read, settle, wake up, and one to spare

T = TypeVar("T")

_LOOKUP = (Path(__file__).parent / "index_lookup.lua").read_text()


class _Line:
    """One Redis connection shared by every question of a process.

    Questions are pipelined and answered in order; nobody waits for a pool, no handshake happens inside a
    deadline, and an answer that comes too late is dropped instead of costing the connection.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._reader = asyncio.create_task(self._read(), name="cairn-index-line")
        self.broken = asyncio.Event()

    async def ask(self, *command: bytes | str | int) -> Any:
        """Raises RedisError, OSError; cancel it freely."""
        if self.broken.is_set():
            raise redis.exceptions.ConnectionError("connection to the index is closed")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        packed = self._connection.pack_command(*command)
        await self._connection.send_packed_command(packed, check_health=False)
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

    def _give_up(self, exc: BaseException) -> None:
        self.broken.set()
        while self._waiting:
            _settle(self._waiting.popleft(), exc)

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._give_up(redis.exceptions.ConnectionError("connection to the index is closed"))
        await self._connection.disconnect(nowait=True)


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # its deadline passed
        return
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class IndexReader:
    """REQUIRES: used from one event loop.  `deadline_ms` bounds a look-up, not the (background) connecting.

    After three misses in a row every look-up fails at once until a PING is answered again.
    """

    def __init__(self, url: str, deadline_ms: float = 2.0) -> None:
        self._deadline = deadline_ms / 1000
        client = async_client(url, socket_timeout=None, socket_connect_timeout=PROBE_SECONDS, protocol=2)
        self._pool = client.connection_pool
        self._line: _Line | None = None
        self._sha = ""
        self._misses = 0
        self._suspect = asyncio.Event()
        self._ready = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether a look-up would be tried now."""
        return self._ready.is_set()

    async def open(self, timeout: float = PROBE_SECONDS) -> bool:
        """Start connecting; wait at most `timeout` seconds for it.  Never raises: connecting goes on."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="cairn-index-reader")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        return self.up

    async def close(self) -> None:
        """Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper

    async def holders(self, namespace: Namespace, keys: Sequence[ChunkKey]) -> dict[tuple[str, int], Depths]:
        """(worker id, epoch) → how many leading chunks of `keys` it holds, by tier.  One round trip.

        Also names lives that are over: callers compare the epoch with the worker's lease.  `shared` is
        knowledge about Redis itself, whoever learnt it.  Raises IndexDown within the deadline.
        """
        if not keys:
            return {}
        if self._keeper is None:
            await self.open(self._deadline)
        if self._line is None or not self.up:
            raise IndexDown("no connection to the chunk index")
        name = chunk_name(namespace, keys[0], keys[0])
        packed = b"".join(keys[:MAX_LOOKUP_KEYS])
        asked = asyncio.ensure_future(self._evaluate(self._line, name, packed))
        try:
            flat = await _within(asked, self._deadline)
        except TimeoutError:
            self._misses += 1
            if self._misses >= MISSES_TO_SUSPECT:
                self._ready.clear()
                self._suspect.set()
            raise IndexDown(f"no answer from the chunk index in {self._deadline * 1000:g} ms") from None
        except (RedisError, OSError) as exc:
            raise IndexDown(f"chunk index: {exc}") from exc
        self._misses = 0
        return {holder_of(flat[i].decode()): Depths(*flat[i + 1 : i + 5]) for i in range(0, len(flat), 5)}

    async def _evaluate(self, line: _Line, name: str, packed: bytes) -> list[Any]:
        try:
            reply = await line.ask("EVALSHA", self._sha, 1, name, packed)
        except NoScriptError:  # somebody ran SCRIPT FLUSH
            reply = await line.ask("EVAL", _LOOKUP, 1, name, packed)
        return list(reply)

    async def _keep(self) -> None:
        """Own the line: connect, watch, give up, connect again."""
        delay = BACKOFF_SECONDS[0]
        while True:
            connection = cast(AbstractConnection, self._pool.make_connection())  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await connection.connect()  # type: ignore[no-untyped-call]
                line = _Line(connection)
            except (RedisError, OSError) as exc:  # TimeoutError is an OSError
                log.debug("chunk index: %s", exc)
                await connection.disconnect(nowait=True)
                await asyncio.sleep(delay)
                delay = min(2 * delay, BACKOFF_SECONDS[1])
                continue
            try:
                while await self._answers(line):
                    delay = BACKOFF_SECONDS[0]
                    self._line = line
                    self._misses = 0
                    self._suspect.clear()
                    self._ready.set()
                    await _first(self._suspect, line.broken)
                    self._ready.clear()
            finally:
                self._ready.clear()
                self._line = None
                await line.close()
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_SECONDS[1])

    async def _answers(self, line: _Line) -> bool:
        """Whether the line works; (re)loads the script, which doubles as the PING."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                self._sha = (await line.ask("SCRIPT", "LOAD", _LOOKUP)).decode()
        except (RedisError, OSError):
            return False
        return True


async def _within(asked: "asyncio.Future[T]", seconds: float) -> T:
    """Its result, in `seconds` or a little later.  Raises TimeoutError.

    A loop that was busy when the time ran out has not looked at its sockets: an answer may lie there.  So it
    gets a few turns to pick it up, or a gateway under load would take its own lateness for that of Redis.
    """
    try:
        if not asked.done():
            await asyncio.wait((asked,), timeout=seconds)
        for _ in range(_LATE_TURNS):
            if asked.done():
                break
            await asyncio.sleep(0)
        if not asked.done():
            raise TimeoutError
        return asked.result()
    finally:
        asked.cancel()


async def _first(*events: asyncio.Event) -> None:
    """Return when any of the events is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class Fleet:
    """Reads the leases: who is alive, where, and how busy."""

    def __init__(self, url: str) -> None:
        self._client = async_client(
            url,
            socket_timeout=FLEET_SECONDS,
            socket_connect_timeout=FLEET_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection the server closed while idle
            decode_responses=True,
            protocol=2,
        )

    async def read(self) -> list[Lease]:
        """Every worker whose lease stands.  Raises IndexDown."""
        try:
            async with asyncio.timeout(2 * FLEET_SECONDS):
                members = cast(list[str], await self._client.zrange(FLEET, 0, MAX_FLEET - 1, desc=True))
                async with self._client.pipeline(transaction=False) as pipe:
                    for member in members:
                        namespace, _, worker_id = member.partition(":")
                        pipe.hgetall(lease_name(namespace, worker_id))
                    held = await pipe.execute() if members else []
        except (RedisError, OSError) as exc:
            raise IndexDown(f"fleet: {exc}") from exc
        leases = []
        for member, fields in zip(members, held, strict=True):
            if not fields:
                continue
            try:
                leases.append(Lease(WorkerInfo.parse(fields), fields))
            except ValueError as exc:
                log.warning("ignoring the lease of %s: %s", member, exc)
        return leases

    async def close(self) -> None:
        """Idempotent."""
        await self._client.aclose()
