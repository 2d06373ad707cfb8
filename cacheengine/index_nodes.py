"""Which server of the chunk index has a prefix family: the one there is, or a node of a Cluster.

Answers come from memory.  The one of a Sentinel is the master: each new connection asks who that is.
"""

import asyncio
import contextlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisError

from cacheengine import redis_url
from cacheengine.index_line import PROBE_SECONDS, Node

log = logging.getLogger(__name__)

LEARN_SECONDS = 30.0  # how long a Cluster's map is believed without asking
DOUBT_SECONDS = 1.0  # ... while a node does not answer, or said that a slot has moved
MAX_NODES = 1024
SLOTS = 16_384

_OPTIONS: Mapping[str, Any] = {
    "socket_timeout": None, "socket_connect_timeout": PROBE_SECONDS, "protocol": 2,
}  # fmt: skip

Where = tuple[str, int]


class Nodes(Protocol):
    """REQUIRES: made and used in one event loop."""

    def find(self, name: bytes) -> Node | None:
        """The server with the key `name`; None where nobody knows."""

    def redirected(self, error: AskError) -> Node | None:
        """The server a refusal names, which is kept in mind."""

    @property
    def up(self) -> bool:
        """Whether every name has a server that answers."""

    async def close(self) -> None: ...


async def evaluate(nodes: Nodes, node: Node, name: bytes, argument: bytes) -> list[Any]:
    """node.evaluate(), or that of the node to which a Cluster sends us on.  Raises RedisError, OSError."""
    try:
        return await node.evaluate(name, argument)
    except AskError as exc:  # MovedError is one
        other = nodes.redirected(exc)
        if other is None:
            raise
        return await other.evaluate(name, argument, asking=not isinstance(exc, MovedError))


class One:
    """One server, or the master of a Sentinel's service."""

    def __init__(self, url: str, script: str, changed: asyncio.Event) -> None:
        self._node = Node(redis_url.async_client(url, **_OPTIONS), script, changed)

    def find(self, name: bytes) -> Node | None:
        return self._node

    def redirected(self, error: AskError) -> Node | None:
        return None

    @property
    def up(self) -> bool:
        return self._node.up

    async def close(self) -> None:
        await self._node.close()


class Cluster:
    """The masters of a Cluster, by CLUSTER SLOTS of whichever answers; asked again when one is silent."""

    def __init__(self, url: str, script: str, changed: asyncio.Event) -> None:
        self._url, self._script, self._changed = url, script, changed
        self._seeds: list[Where] = [
            address.target for address in redis_url.parse(url).addresses if isinstance(address.target, tuple)
        ]
        self._nodes: dict[Where, Node] = {}
        self._starts: list[int] = []  # of slot ranges
        self._ranges: list[tuple[int, Where]] = []  # last slot, node
        self._doubt = asyncio.Event()
        for seed in self._seeds:
            self._add(seed)
        self._learner = asyncio.create_task(self._learn(), name="cairn-index-cluster")

    def find(self, name: bytes) -> Node | None:
        slot = key_slot(name)
        i = bisect_right(self._starts, slot) - 1
        if i >= 0 and slot <= self._ranges[i][0]:
            return self._nodes.get(self._ranges[i][1])
        self._doubt.set()
        return None

    def redirected(self, error: AskError) -> Node | None:
        if isinstance(error, MovedError):  # a slot rarely moves alone
            self._doubt.set()
        return self._nodes.get((error.host, error.port))

    @property
    def up(self) -> bool:
        return _whole(self._starts, self._ranges) and all(
            (node := self._nodes.get(where)) is not None and node.up for _, where in self._ranges
        )

    async def close(self) -> None:
        self._learner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._learner
        for node in self._nodes.values():
            await node.close()

    def _add(self, where: Where) -> None:
        client = redis_url.async_node(self._url, *where, **_OPTIONS)
        self._nodes[where] = Node(client, self._script, self._changed)

    async def _learn(self) -> None:
        while True:
            known = await self._asked()
            sure = known and all(node.up for node in self._nodes.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEARN_SECONDS if sure else DOUBT_SECONDS if known else 0.05):
                    await self._doubt.wait()
                    await asyncio.sleep(0.05)  # one question for many doubts
            self._doubt.clear()

    async def _asked(self) -> bool:
        """Take over the map of the first node that answers."""
        for where, node in list(self._nodes.items()):
            if not node.up:
                continue
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    drawn = _drawn(await node.ask("CLUSTER", "SLOTS"), where[0])
            except (RedisError, OSError) as exc:
                log.debug("chunk index: %s", exc)
                continue
            if drawn:
                await self._take(drawn)
                return True
        for seed in self._seeds:  # perhaps they know other nodes by now
            if seed not in self._nodes:
                self._add(seed)
        return False

    async def _take(self, drawn: list[tuple[int, int, Where]]) -> None:
        wanted = {where for _, _, where in drawn}
        for where in wanted - set(self._nodes):
            self._add(where)
        self._starts = [first for first, _, _ in drawn]
        self._ranges = [(last, where) for _, last, where in drawn]
        self._changed.set()
        for where in set(self._nodes) - wanted:
            await self._nodes.pop(where).close()


def _whole(starts: list[int], ranges: list[tuple[int, Where]]) -> bool:
    """Whether there is no slot that nobody serves."""
    ends = [last + 1 for last, _ in ranges]
    return bool(ranges) and starts == [0, *ends[:-1]] and ends[-1] == SLOTS


def _drawn(answer: Any, asked: str) -> list[tuple[int, int, Where]]:
    """Slot ranges in order, from CLUSTER SLOTS; empty when it makes no sense."""
    ranges = []
    for part in answer if isinstance(answer, list) else ():
        match part:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_]:
                ranges.append((first, last, (host.decode() if host else asked, port)))
    ranges.sort()
    return ranges if len({where for _, _, where in ranges}) <= MAX_NODES else []


KINDS: dict[str, Callable[[str, str, asyncio.Event], Nodes]] = {
    "single": One, "sentinel": One, "cluster": Cluster,
}  # fmt: skip
