"""What operators said about workers, as this gateway knows it: drained, or removed.

A drained worker gets no new traffic until it is resumed, restarts included.  A removed one is forgotten until
it restarts or is resumed.  Where there is a store, orders hold for every gateway of the fleet.
"""

import logging
from collections.abc import Callable, Collection
from time import monotonic
from typing import Literal

from cacheengine import index_orders
from cacheengine.errors import IndexDown
from cacheengine.index_orders import Orders
from router.worker import Worker

log = logging.getLogger(__name__)

DRAINED, REMOVED = "drained", "removed@"  # a boot id follows "removed@"
Deed = Literal["drain", "resume", "remove"]


class StandingOrders:
    """REQUIRES: used from one event loop; `store` is opened and closed by the caller."""

    def __init__(self, store: Orders | None = None, clock: Callable[[], float] = monotonic) -> None:
        """Without a store they are this gateway's own."""
        self._store, self._clock = store, clock
        self._held, self._given = dict[str, str](), 0
        self._sweep_at = clock() + index_orders.SWEEP_SECONDS  # not before all sources were heard

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._held

    def drained(self, worker: Worker) -> bool:
        return self._held.get(worker.id) == DRAINED

    def removed(self, worker: Worker) -> bool:
        """This process of it; the next one is welcome."""
        return self._held.get(worker.id) == REMOVED + worker.boot_id

    def gone(self, known: Collection[str]) -> list[str]:
        """Who was removed and is not among `known`."""
        return sorted(
            id_ for id_, order in self._held.items() if order.startswith(REMOVED) and id_ not in known
        )

    async def read(self) -> None:
        """Hear what other gateways were told.  A store that is down leaves the last known orders."""
        if self._store is None:
            return
        given = self._given
        try:
            held = dict(await self._store.read())
        except IndexDown as exc:
            log.debug("keeping the last known orders: %s", exc)
            return
        if given == self._given:  # or it was read before the order that was given meanwhile
            self._held = held

    async def sweep(self, seen: Collection[str]) -> None:
        """Now and then: forget orders about workers that nobody has seen for very long."""
        if self._store is None or not self._held or self._clock() < self._sweep_at:
            return
        self._sweep_at = self._clock() + index_orders.SWEEP_SECONDS
        try:
            for worker_id in await self._store.sweep(seen):
                log.info("the order about worker %s is forgotten: nobody has seen it for long", worker_id)
        except IndexDown as exc:
            log.debug("orders are swept later: %s", exc)

    async def give(self, worker_id: str, what: Deed, boot_id: str) -> None:
        """Raises IndexDown when the other gateways cannot be told: then nothing changes here either."""
        order = {"drain": DRAINED, "remove": REMOVED + boot_id, "resume": ""}[what]
        if self._store is not None:
            await self._store.give(worker_id, order)
        self._given += 1
        held = {id_: said for id_, said in self._held.items() if id_ != worker_id}
        self._held = {**held, worker_id: order} if order else held
