"""What operators said about workers: drained, or removed.  One HASH, the same for every gateway.

    cairn:orders    HASH   field <worker id>, value "drained" or "removed@<boot id>"; fields @version, @swept,
                           @missed:<worker id> (no worker can be called that)

Orders are about names, not lives: a drained worker that restarts stays drained until it is resumed.
`@version` counts them.  A Redis where it is gone, or lower than before, lost its memory or the end of it, and
is told again by whichever gateway remembers.

An order is forgotten when no gateway has seen its worker for KEPT_HOURS.  Only hours in which some gateway
looked count (`@missed`, at most one an hour for the whole fleet): a worker that restarts, or a fleet that was
off for a summer, finds its orders again.
"""

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from cacheengine.errors import IndexDown
from cacheengine.redis_url import DOWN, async_asker

ORDERS = "cairn:orders"
VERSION = "@version"
ORDERS_SECONDS = 1.0
SWEEP_SECONDS = 3600.0
KEPT_HOURS = 30 * 24

_TELL_AGAIN = (Path(__file__).parent / "index_orders.lua").read_text()
_SWEEP = (Path(__file__).parent / "index_sweep.lua").read_text()


class Orders:
    """REQUIRES: used from one event loop.  `name`: another HASH that is kept in the same way."""

    def __init__(self, url: str, name: str = ORDERS) -> None:
        self._name = name
        # a stranger's bytes are nobody's order
        told = {"decode_responses": True, "encoding_errors": "replace"}
        self._client = async_asker(url, ORDERS_SECONDS, **told)
        self._last: dict[str, str] = {}

    async def changed(self) -> bool:
        """Whether anything was said since the last read(): cheap, where there is much.  Raises IndexDown."""
        try:
            async with asyncio.timeout(2 * ORDERS_SECONDS):
                said = await cast(Any, self._client.hget(self._name, VERSION))
        except (*DOWN, OSError) as exc:
            raise IndexDown(f"{self._name}: {exc}") from exc
        return _version({VERSION: said or ""}) != _version(self._last)

    async def read(self) -> Mapping[str, str]:
        """Worker id → order.  Raises IndexDown."""
        try:
            async with asyncio.timeout(2 * ORDERS_SECONDS):
                held = await self._held()
                if _version(held) < (last := _version(self._last)):
                    flat = [part for item in self._last.items() for part in item]
                    await cast(Any, self._client.eval(_TELL_AGAIN, 1, self._name, str(last), *flat))
                    held = await self._held()
        except (*DOWN, OSError) as exc:
            raise IndexDown(f"{self._name}: {exc}") from exc
        self._last = held
        return {field: order for field, order in held.items() if not field.startswith("@")}

    async def give(self, worker_id: str, order: str) -> None:
        """For every gateway from its next refresh on; "" takes the order back.  Raises IndexDown, and then
        nobody can say whether it was heard."""
        try:
            async with asyncio.timeout(2 * ORDERS_SECONDS):
                await self.read()  # or an order given right after a loss would hide the loss
                async with self._client.pipeline(transaction=False) as pipe:
                    pipe.hdel(ORDERS, f"@missed:{worker_id}")
                    if order:
                        pipe.hset(self._name, worker_id, order)
                    else:
                        pipe.hdel(self._name, worker_id)
                    pipe.hincrby(self._name, VERSION, 1)
                    pipe.hgetall(self._name)
                    self._last = (await pipe.execute())[-1]
        except (*DOWN, OSError) as exc:
            raise IndexDown(f"{self._name}: {exc}") from exc

    async def sweep(self, seen: Collection[str]) -> list[str]:
        """`seen`: ids of all workers that this gateway knows of now.  Returns those whose orders were
        forgotten.  For every gateway to call every SWEEP_SECONDS.  Raises IndexDown."""
        given = (str(int(SWEEP_SECONDS)), str(KEPT_HOURS), *seen)
        try:
            async with asyncio.timeout(2 * ORDERS_SECONDS):
                return cast(list[str], await cast(Any, self._client.eval(_SWEEP, 1, ORDERS, *given)))
        except (*DOWN, OSError) as exc:
            raise IndexDown(f"orders: {exc}") from exc

    async def close(self) -> None:
        """Idempotent."""
        await self._client.aclose()

    async def _held(self) -> dict[str, str]:
        return cast(dict[str, str], await self._client.hgetall(self._name))


def _version(held: Mapping[str, str]) -> int:
    """-1 where there is none."""
    text = held.get(VERSION, "")
    return int(text) if text.isascii() and text.isdecimal() else -1
