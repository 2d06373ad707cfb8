"""The limits' side of Redis: the script on a tenant's HASH, and how many gateways live."""

import asyncio
import logging
import time
from pathlib import Path

import msgspec
from redis.exceptions import RedisError, ResponseError

from cacheengine import redis_url
from cacheengine.index_nodes import KINDS, Nodes, evaluate
from cacheengine.index_reader import within
from gateway.limits_book import Question, Standing

log = logging.getLogger(__name__)

GATEWAYS = "cairn:gateways"  # ZSET: a gateway's process → until when it is believed to live, Unix seconds
LEASE_SECONDS = 15.0

_SCRIPT = (Path(__file__).parent / "limits.lua").read_text()


class LimitsDown(Exception):
    """Redis did not answer.  `heard`: it may have carried out what was asked."""

    def __init__(self, heard: bool) -> None:
        self.heard = heard


class LimitsScript:
    """limits.lua on whichever server has a tenant's HASH.  Raises ConfigError."""

    def __init__(self, url: str, deadline: float) -> None:
        self._url, self._deadline = url, deadline
        self._make = KINDS[redis_url.parse(url).kind]
        self._nodes: Nodes | None = None
        self._trouble = ""

    def open(self) -> None:
        """Start connecting.  REQUIRES: a running loop."""
        self._nodes = self._make(self._url, _SCRIPT, asyncio.Event())

    @property
    def up(self) -> bool:
        return self._nodes is not None and self._nodes.up

    async def close(self) -> None:
        """Idempotent."""
        nodes, self._nodes = self._nodes, None
        if nodes is not None:
            await nodes.close()

    async def ask(self, tenant: str, question: Question) -> Standing:
        """Raises LimitsDown within the deadline."""
        name = b"cairn:{tenant:%s}:used" % tenant.encode()
        nodes = self._nodes
        node = nodes.find(name) if nodes else None
        if nodes is None or node is None or not node.up:
            raise LimitsDown(heard=False)
        asked = asyncio.ensure_future(evaluate(nodes, node, name, msgspec.json.encode(question)))
        try:
            reply = await within(asked, self._deadline)
            return Standing(*map(int, reply))
        except TimeoutError:
            node.missed()
            raise LimitsDown(heard=True) from None
        except (RedisError, OSError, TypeError, ValueError) as exc:
            if isinstance(exc, ResponseError) and str(exc) != self._trouble:  # it answers, and always so
                self._trouble = str(exc)
                log.warning("limits are counted by each gateway for its part: Redis says %s", exc)
            raise LimitsDown(heard=False) from exc


class Gateways:
    """How many gateways live, itself included: a lease each.  The last known number holds without Redis."""

    def __init__(self, url: str, name: str) -> None:
        self._name = name
        self.alive = 1
        self._client = redis_url.async_asker(url, 1.0)

    async def beat(self, seconds: float = LEASE_SECONDS) -> None:
        """Never raises.  `seconds` 0: not any more."""
        now = time.time()
        try:
            async with asyncio.timeout(2.0), self._client.pipeline(transaction=False) as pipe:
                if seconds:
                    pipe.zadd(GATEWAYS, {self._name: now + seconds})
                else:
                    pipe.zrem(GATEWAYS, self._name)
                pipe.zremrangebyscore(GATEWAYS, 0, now)
                pipe.zcard(GATEWAYS)
                self.alive = max(1, int((await pipe.execute())[-1]))
        except (*redis_url.DOWN, OSError) as exc:
            log.debug("gateways: %r", exc)

    async def close(self) -> None:
        await self.beat(0)
        await self._client.aclose()
