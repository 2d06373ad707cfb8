"""Which workers take traffic.  Nothing else in the gateway knows that discovery exists.

Workers are named by sources (router/sources.py).  A worker takes traffic once its /health answered 200, and
leaves when a request could not connect, until /health answers again.  When its source cannot be asked, the
last known worker stays, marked stale, as long as its /health answers.  So it does when its lease is gone: a
Redis that refuses writes loses the leases of workers that are well.  A file or a name server that answers
without it means it: then it leaves, after the source's grace.

Operators drain workers (no new traffic until resumed; what is under way finishes) and remove them: that is
router/orders.py.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import httpx

from cacheengine.index_orders import Orders
from cacheengine.index_reader import Fleet
from cacheengine.keys import KeyScheme
from router.orders import DRAINED, Deed, StandingOrders
from router.probe import Card, Probe
from router.sources import Leases, Source, SourceDown, Static
from router.worker import StaticWorker, Worker, majority_scheme

log = logging.getLogger(__name__)

ADAPTERS_SECONDS = 30.0  # between two looks at a worker's list of adapters
ADAPTERS_AT_ONCE = 32  # looks per refresh, however large the fleet
WARMUP_SECONDS = 30.0
HEAR_SECONDS = 0.25  # between two readings of the heartbeats, which busy workers write as often
LEASE_SECONDS = 0.002  # ... and at least this long for each worker: a large fleet is read less often


class UnknownWorker(LookupError):
    """No source names a worker of that id."""


@dataclass(slots=True)
class _Known:
    worker: Worker
    source: Source
    since: float | None  # when it was ready first; None: not yet
    ready: bool = False  # /health said so, and no request found otherwise since
    healthy: bool = False  # what /health said last
    gone_since: float | None = None  # its source answered without it
    cards: tuple[Card, ...] = ()  # of its models
    adapters_asked: float = -math.inf

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted({card.id for card in self.cards if card.parent}))


class Registry:
    """REQUIRES: used from one event loop; what is passed in is opened and closed by the caller."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        fleet: Fleet | None = None,
        static: Sequence[StaticWorker] = (),
        interval: float = 1.0,
        clock: Callable[[], float] = monotonic,
        on_leave: Callable[[str], None] = lambda worker_id: None,
        *,
        sources: Sequence[Source] = (),
        orders: Orders | None = None,
        warmup_seconds: float = WARMUP_SECONDS,
    ) -> None:
        """Leases win over `static`, and that over `sources`.  Without `orders` they are this gateway's own.
        `on_leave` hears the id of a worker that is forgotten, so that others forget it too."""
        self._probe, self._interval, self._clock = Probe(http), interval, clock
        self._sources: list[Source] = [Leases(fleet)] if fleet else []
        self._sources += [Static(static), *sources]
        self._orders = StandingOrders(orders, clock)
        self._warmup, self._on_leave = warmup_seconds, on_leave
        self._known: dict[str, _Known] = {}
        self._heard: set[int] = set()  # sources (by their place) that have answered before
        self._distrusted: set[tuple[str, str]] = set()  # (worker id, boot id)
        self._proving = False  # a refresh waits for answers: who came may stand in for who went
        self._troubles: set[str] = set()  # that were logged and last
        self._ready: tuple[Worker, ...] = ()
        self._by_model: dict[str, tuple[Worker, ...]] = {}
        self._schemes: dict[str, KeyScheme | None] = {}

    def snapshot(self) -> tuple[Worker, ...]:
        """Every worker that takes traffic now, by id."""
        return self._ready

    def workers_for(self, model: str) -> tuple[Worker, ...]:
        """Those that serve this model, or have this adapter."""
        return self._by_model.get(model, ())

    def models(self) -> tuple[str, ...]:
        """Served names and adapters, sorted."""
        return tuple(sorted(self._by_model))

    def card(self, model: str) -> Card:
        """What is known of a served name or adapter; the shortest context of its workers, who may get any."""
        said = [card for known in self._known.values() if known.ready for card in known.cards]
        said = [card for card in said if card.id == model] or [Card(model)]
        lengths = [card.max_model_len for card in said if card.max_model_len is not None]
        return Card(model, said[0].parent, said[0].root, min(lengths, default=None))

    def adapter(self, model: str) -> bool:
        """Whether this is the name of a LoRA adapter of the workers that serve it."""
        return any(worker.model != model for worker in self.workers_for(model))

    def scheme(self, model: str) -> KeyScheme | None:
        """How to name chunks of this model's prompts; None: no worker whose names we can make."""
        return self._schemes.get(model)

    def describe(self) -> list[dict[str, Any]]:
        """Every known worker, ready or not, in plain types."""
        return [
            {
                "id": known.worker.id,
                "url": known.worker.url,
                "model": known.worker.model,
                "adapters": list(known.adapters),
                "state": self._state(known),
                "stale": known.worker.stale,
                "leased": known.source.vouches,
                "source": known.source.name,
                "share": self._share(known),
                "trusted": known.worker.trusted,
                "namespace": known.worker.namespace.hex() if known.worker.namespace else "",
                "chunk_tokens": known.worker.chunk_tokens,
                "epoch": known.worker.epoch,
                "tiers": list(known.worker.tiers),
                "load": known.worker.load._asdict(),
                "beat": dict(known.worker.beat),
            }
            for _, known in sorted(self._known.items())
        ]

    def find(self, worker_id: str) -> Worker | None:
        """A known worker, ready or not."""
        known = self._known.get(worker_id)
        return known.worker if known else None

    def removed(self) -> list[str]:
        """Who was removed and has not come back."""
        return self._orders.gone(self._known)

    # -- what others say ---------------------------------------------------------------------------

    def mark_down(self, worker_id: str) -> None:
        """A request could not connect: no traffic until /health answers again.  Unknown ids are fine."""
        known = self._known.get(worker_id)
        if known is not None and known.ready:
            log.warning("worker %s is down", worker_id)
            known.ready = False
            self._publish()

    def distrust(self, asked: Worker) -> None:
        """Its tokens or chunk names are not ours: never count on a hit there until it restarts.  `asked` is
        the worker as it was asked; the process that took its place meanwhile is not blamed."""
        if (known := self._known.get(asked.id)) is None:
            return
        self._distrusted.add((asked.id, asked.boot_id))
        if known.worker.boot_id == asked.boot_id:
            known.worker = replace(known.worker, trusted=False)
            self._publish()

    async def order(self, worker_id: str, what: Deed) -> None:
        """Holds here at once and everywhere within a refresh.  Raises UnknownWorker, and IndexDown when the
        other gateways cannot be told: then nothing changes here either."""
        known = self._known.get(worker_id)
        if known is None and (what != "resume" or worker_id not in self._orders):
            raise UnknownWorker(worker_id)
        await self._orders.give(worker_id, what, known.worker.boot_id if known else "")
        log.info("worker %s: %s", worker_id, what)
        known = self._known.get(worker_id)  # a refresh or another order may have come first
        if known is not None and self._orders.removed(known.worker):
            self._drop(worker_id, "was removed")
        self._publish()

    # -- looking -----------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask the sources, then those workers who must prove themselves."""
        named, _ = await asyncio.gather(
            asyncio.gather(*map(self._ask, range(len(self._sources)))), self._read_orders()
        )
        self._merge(named)
        # also those who were removed, and are still there
        await self._orders.sweep(
            {worker.id for workers in named for worker in workers or ()} | {*self._known}
        )
        asked = [known for known in self._known.values() if not self._vouched(known)]
        self._proving = True
        try:
            answers, _ = await asyncio.gather(
                asyncio.gather(*map(self._healthy, asked)),
                asyncio.gather(*map(self._look_for_adapters, self._curious())),
            )
        finally:
            self._proving = False
        well = {known.worker.model for known, healthy in zip(asked, answers, strict=True) if healthy}
        well |= {known.worker.model for known in self._known.values() if self._vouched(known)}
        for known, answer in zip(asked, answers, strict=True):
            # who is late may be busy: others do its work, if there are any; a standstill empties no fleet
            healthy = known.ready and known.worker.model not in well if answer is None else answer
            if healthy != known.ready:
                log.info("worker %s is %s", known.worker.id, "ready" if healthy else "not ready")
            known.ready = known.healthy = healthy
            if healthy and known.since is None:
                known.since = self._clock()
        self._publish()

    async def hear(self) -> None:
        """Read the heartbeats of the workers that are known; who came or went is refresh()'s business."""
        for place, source in enumerate(self._sources):
            if not source.vouches:
                continue
            for worker in await self._ask(place) or ():
                known = self._known.get(worker.id)
                if known is not None and known.source is source and _life(known.worker) == _life(worker):
                    known.worker = replace(known.worker, load=worker.load, beat=worker.beat)
        self._publish()

    async def run(self) -> None:
        """Look every `interval` seconds and listen in between, for ever."""
        looked = self._clock()
        while True:
            await asyncio.sleep(min(self._interval, max(HEAR_SECONDS, LEASE_SECONDS * len(self._known))))
            try:
                if self._clock() - looked < self._interval:
                    await self.hear()
                else:
                    looked = self._clock()
                    await self.refresh()
            except Exception:  # the top of a task: discovery must outlive a bug in it
                log.exception("registry")

    async def _ask(self, place: int) -> Sequence[Worker] | None:
        source = self._sources[place]
        try:
            workers = await source.read()
        except SourceDown as exc:
            log.debug("keeping the last known workers: %s", exc)
            return None
        except Exception:  # noqa: BLE001  nothing one source says may keep the others from being heard
            self._complain(f"workers of source {place} ({source.name})")
            return None
        self._troubles.discard(f"workers of source {place} ({source.name})")
        return workers

    async def _read_orders(self) -> None:
        try:
            await self._orders.read()
        except Exception:  # noqa: BLE001  as above
            self._complain("orders")
            return
        self._troubles.discard("orders")

    def _complain(self, about: str) -> None:
        """Once, not every second."""
        if about not in self._troubles:
            log.warning("keeping the last known %s", about, exc_info=True)
            self._troubles.add(about)

    def _merge(self, named: Sequence[Sequence[Worker] | None]) -> None:
        """The earlier source keeps an id and a URL that a later one names too."""
        ids: set[str] = set()
        urls: set[str] = set()
        for place, (source, workers) in enumerate(zip(self._sources, named, strict=True)):
            for worker in workers or ():
                if worker.id not in ids and worker.url not in urls and not self._orders.removed(worker):
                    self._meet(worker, source, new=place in self._heard)
                    ids.add(worker.id)
            taken = urls | {worker.url for worker in workers or ()}
            later = {
                word for others in named[place + 1 :] for one in others or () for word in (one.id, one.url)
            }
            self._miss(source, None if workers is None else ids, taken, later)
            if workers is not None:
                self._heard.add(place)
            mine = [known.worker for known in self._known.values() if known.source is source]
            ids |= {worker.id for worker in mine}
            urls |= {worker.url for worker in mine}

    def _meet(self, worker: Worker, source: Source, new: bool) -> None:
        """`new`: it joins a fleet that was there before, and warms up."""
        if (worker.id, worker.boot_id) in self._distrusted:
            worker = replace(worker, trusted=False)
        known = self._known.get(worker.id)
        # a new process, or a new address, has to prove itself: it may beat before it listens
        if known is None or (known.worker.boot_id, known.worker.url) != (worker.boot_id, worker.url):
            if worker.namespace is not None and not worker.trusted:
                log.warning(
                    "worker %s names chunks in another way; it gets no cache-aware traffic", worker.id
                )
            self._known[worker.id] = _Known(worker, source, None if new or known else -math.inf)
        else:
            known.worker, known.source, known.gone_since = worker, source, None

    def _miss(self, source: Source, seen: set[str] | None, taken: set[str], later: set[str]) -> None:
        """`seen` None: the source could not be asked.  `taken`: URLs that belong to those who were named.
        `later`: ids and URLs named by the sources after it."""
        now = self._clock()
        for known in [known for known in self._known.values() if known.source is source]:
            worker = known.worker
            if self._orders.removed(worker):
                self._drop(worker.id, "was removed")
            elif worker.id not in (seen or ()) and worker.url in taken:
                self._drop(worker.id, "has another name now")
            elif seen is None:
                known.worker = replace(worker, stale=True)
            elif worker.id not in seen:
                if known.gone_since is None:
                    known.gone_since = now
                    known.worker = replace(worker, stale=True)
                # of a lease that is gone nobody said that it should go: ask the worker itself
                kept = source.vouches and known.healthy and not later & {worker.id, worker.url}
                over = not source.grace_seconds or now - known.gone_since > source.grace_seconds
                if over and not kept:
                    self._drop(worker.id, "left")

    def _drop(self, worker_id: str, why: str) -> None:
        del self._known[worker_id]
        self._distrusted = {held for held in self._distrusted if held[0] != worker_id}
        log.info("worker %s %s", worker_id, why)
        self._on_leave(worker_id)

    def _vouched(self, known: _Known) -> bool:
        """A fresh lease speaks for a worker that was ready; everybody else is asked."""
        return known.ready and known.source.vouches and not known.worker.stale

    async def _healthy(self, known: _Known) -> bool | None:
        return await self._probe.healthy(known.worker.url, otherwise=known.ready)

    def _curious(self) -> list[_Known]:
        """Whose adapters to look at now: of the ready, those not asked for longest."""
        due = self._clock() - ADAPTERS_SECONDS
        waiting = [known for known in self._known.values() if known.ready and known.adapters_asked <= due]
        return sorted(waiting, key=lambda known: known.adapters_asked)[:ADAPTERS_AT_ONCE]

    async def _look_for_adapters(self, known: _Known) -> None:
        known.adapters_asked = self._clock()
        cards = await self._probe.cards(known.worker.url)
        if cards is not None:
            known.cards = cards

    # -- what follows ------------------------------------------------------------------------------

    def _state(self, known: _Known) -> str:
        if self._orders.drained(known.worker):
            return DRAINED
        return "ready" if known.ready else "down"

    def _share(self, known: _Known) -> float:
        if known.since is None or not self._warmup:
            return 1.0
        return round(min(1.0, max(0.0, (self._clock() - known.since) / self._warmup)), 4)

    def _before(self, urls: set[str]) -> list[Worker]:
        """Those who took traffic when the refresh began, and whose successors have not answered yet."""
        held = []
        for worker in self._ready:
            now = self._known.get(worker.id)
            same = now and (now.worker.boot_id, now.worker.url) == (worker.boot_id, worker.url)
            ordered = self._orders.removed(worker) or self._orders.drained(worker)
            if not same and not ordered and worker.url not in urls:
                held.append(worker)
        return held

    def _publish(self) -> None:
        ready = []
        for _, known in sorted(self._known.items()):
            if self._state(known) == "ready":
                share = self._share(known)
                plain = share == 1 and not known.adapters
                ready.append(
                    known.worker if plain else replace(known.worker, share=share, adapters=known.adapters)
                )
        if self._proving:
            ready = sorted([*ready, *self._before({worker.url for worker in ready})], key=lambda one: one.id)
        by_model: dict[str, list[Worker]] = {}
        for worker in ready:
            by_model.setdefault(worker.model, []).append(worker)
        bases = set(by_model)
        for worker in ready:
            for name in set(worker.adapters) - bases:
                by_model.setdefault(name, []).append(worker)
        self._ready = tuple(ready)
        self._by_model = {model: tuple(workers) for model, workers in by_model.items()}
        self._schemes = {model: majority_scheme(workers) for model, workers in by_model.items()}


def _life(worker: Worker) -> tuple[str, str, int]:
    return worker.url, worker.boot_id, worker.epoch
