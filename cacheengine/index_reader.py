"""The gateways' side of the chunk index: who holds how much of this prompt, and who is alive.

Trouble is mapped to IndexDown here and nowhere else; the router then falls back to its ring.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from redis.exceptions import RedisError

from cacheengine import redis_url
from cacheengine.errors import IndexDown
from cacheengine.index_line import PROBE_SECONDS
from cacheengine.index_nodes import KINDS, Nodes, evaluate
from cacheengine.index_schema import (
    FLEET,
    WRONG_TYPE,
    Depths,
    Lease,
    WorkerInfo,
    chunk_name,
    holder_of,
    lease_name,
)
from cacheengine.keys import ChunkKey, Namespace

log = logging.getLogger(__name__)

MAX_LOOKUP_KEYS = 512  # 131,072 tokens in chunks of 256; the rest of a longer prompt is not asked for
MAX_FLEET = 1024
MAX_NAMES = 16_384  # lives remembered by their fields
FLEET_SECONDS = 1.0
_LATE_TURNS = 5  # of the loop: poll, read, settle, wake up, and one to spare

T = TypeVar("T")

_LOOKUP = (Path(__file__).parent / "index_lookup.lua").read_text()

Holder = tuple[str, int]  # worker id, epoch


class IndexReader:
    """REQUIRES: used from one event loop.  `deadline_ms` bounds a look-up, not the (background) connecting.

    After three misses in a row look-ups of that server fail at once, until it answers again.  Raises
    ConfigError.
    """

    def __init__(self, url: str, deadline_ms: float = 2.0) -> None:
        self._url, self._deadline = url, deadline_ms / 1000
        self._make = KINDS[redis_url.parse(url).kind]
        self._nodes: Nodes | None = None
        self._changed = asyncio.Event()
        self._names: dict[bytes, Holder | None] = {}

    @property
    def up(self) -> bool:
        """Whether every look-up would be tried now; on a Cluster each node must be there."""
        return self._nodes is not None and self._nodes.up

    async def open(self, timeout: float = PROBE_SECONDS) -> bool:
        """Start connecting; wait at most `timeout` seconds until it is `up`, and say whether it is.  Never
        raises: connecting goes on, and what is there already is asked."""
        if self._nodes is None:
            self._nodes = self._make(self._url, _LOOKUP, self._changed)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self.up:
                    self._changed.clear()
                    await self._changed.wait()
        return self.up

    async def close(self) -> None:
        """Idempotent."""
        nodes, self._nodes = self._nodes, None
        if nodes is not None:
            await nodes.close()

    async def holders(self, namespace: Namespace, keys: Sequence[ChunkKey]) -> dict[Holder, Depths]:
        """(worker id, epoch) → how many leading chunks of `keys` it holds, by tier.  One round trip.

        Also names lives that are over: callers compare the epoch with the worker's lease.  `shared` is
        knowledge about Redis itself, whoever learnt it.  Raises IndexDown within the deadline.
        """
        if not keys:
            return {}
        if self._nodes is None:
            await self.open(self._deadline)
        name = chunk_name(namespace, keys[0], keys[0])
        nodes = self._nodes
        node = nodes.find(name) if nodes else None
        if nodes is None or node is None or not node.up:
            raise IndexDown("no connection to the chunk index")
        packed = b"".join(keys[:MAX_LOOKUP_KEYS])
        asked = asyncio.ensure_future(evaluate(nodes, node, name, packed))
        try:
            flat = await within(asked, self._deadline)
        except TimeoutError:
            node.missed()
            raise IndexDown(f"no answer from the chunk index in {self._deadline * 1000:g} ms") from None
        except (RedisError, OSError) as exc:
            raise IndexDown(f"chunk index: {exc}") from exc
        return self._depths(flat)

    def _depths(self, flat: Sequence[Any]) -> dict[Holder, Depths]:
        held: dict[Holder, Depths] = {}
        for i in range(0, len(flat), 3):
            chunk, bits, fields = flat[i : i + 3]
            ends = Depths(bits & 1 and chunk, bits & 2 and chunk, bits & 4 and chunk, bits & 8 and chunk)
            for field in fields:
                if (holder := self._holder(field)) is not None:
                    before = held.get(holder)
                    held[holder] = ends if before is None else Depths(*map(max, before, ends))
        return held

    def _holder(self, field: bytes) -> Holder | None:
        """None for a field nobody of us wrote."""
        try:
            return self._names[field]
        except KeyError:
            pass
        if len(self._names) >= MAX_NAMES:
            self._names.clear()
        try:
            holder = holder_of(field.decode())
        except ValueError:
            holder = None
        self._names[field] = holder
        return holder


async def within(asked: "asyncio.Future[T]", seconds: float) -> T:
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


class Fleet:
    """Reads the leases: who is alive, where, and how busy."""

    def __init__(self, url: str) -> None:
        # a stranger's bytes cost nobody else the lease
        told = {"decode_responses": True, "encoding_errors": "replace"}
        self._client = redis_url.async_asker(url, FLEET_SECONDS, **told)
        self._full = False
        self._bad = set[str]()  # members whose lease makes no sense, which was said

    async def read(self) -> list[Lease]:
        """Every worker whose lease stands.  Raises IndexDown."""
        try:
            async with asyncio.timeout(2 * FLEET_SECONDS):
                members = cast(list[str], await self._client.zrange(FLEET, 0, MAX_FLEET, desc=True))
                full, members = len(members) > MAX_FLEET, members[:MAX_FLEET]
                async with self._client.pipeline(transaction=False) as pipe:
                    for member in members:
                        namespace, _, worker_id = member.partition(":")
                        pipe.hgetall(lease_name(namespace, worker_id))
                    # a stranger's key costs one lease
                    held = await pipe.execute(raise_on_error=False) if members else []
                for answer in held:
                    if isinstance(answer, Exception) and not str(answer).startswith(WRONG_TYPE):
                        raise answer
        except (*redis_url.DOWN, OSError) as exc:
            raise IndexDown(f"fleet: {exc}") from exc
        if full and not self._full:
            log.warning("the fleet has more than %d workers; further ones are not read", MAX_FLEET)
        self._full = full
        leases, bad = [], set[str]()
        for member, fields in zip(members, held, strict=True):
            if not fields:
                continue
            try:
                if isinstance(fields, Exception):
                    raise ValueError(str(fields))
                leases.append(Lease(WorkerInfo.parse(fields), fields))
            except ValueError as exc:
                bad.add(member)
                if member not in self._bad:  # once, not every second
                    log.warning("ignoring the lease of %s: %s", member, exc)
        self._bad = bad
        return leases

    async def close(self) -> None:
        """Idempotent."""
        await self._client.aclose()
