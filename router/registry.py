"""Which workers take traffic.  Nothing else in the gateway knows that discovery exists.

Workers come from leases in Redis and from a static list (a lease wins over a static entry of the same URL).
A worker takes traffic once its /health answered 200, and leaves when a request could not connect, until
/health answers again.  When a lease is gone or Redis does not answer, the last known worker stays, marked
stale, as long as its /health answers.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import httpx

from cacheengine.errors import IndexDown
from cacheengine.index_reader import Fleet
from cacheengine.keys import KeyScheme
from router.worker import StaticWorker, Worker, from_lease, from_static, majority_scheme

log = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0
STALE_SECONDS = 10.0  # a worker whose lease is gone, although Redis answers, leaves after this


@dataclass(slots=True)
class _Known:
    worker: Worker
    leased: bool
    ready: bool = False  # /health said so, and no request found otherwise since
    gone_since: float | None = None  # Redis answered without this worker's lease


class Registry:
    """REQUIRES: used from one event loop; `http` and `fleet` are opened and closed by the caller."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        fleet: Fleet | None = None,
        static: Sequence[StaticWorker] = (),
        interval: float = 1.0,
        clock: Callable[[], float] = monotonic,
        on_leave: Callable[[str], None] = lambda worker_id: None,
    ) -> None:
        """`on_leave` hears the id of a worker that is forgotten, so that others forget it too."""
        self._http, self._fleet, self._interval, self._clock = http, fleet, interval, clock
        self._on_leave = on_leave
        self._known = {w.id: _Known(w, leased=False) for w in map(from_static, static)}
        self._distrusted: set[tuple[str, str]] = set()  # (worker id, boot id)
        self._ready: tuple[Worker, ...] = ()

    def snapshot(self) -> tuple[Worker, ...]:
        """Every worker that takes traffic now, by id."""
        return self._ready

    def workers_for(self, model: str) -> tuple[Worker, ...]:
        """Those that serve this model."""
        return tuple(worker for worker in self._ready if worker.model == model)

    def models(self) -> tuple[str, ...]:
        """Served names, sorted."""
        return tuple(sorted({worker.model for worker in self._ready}))

    def scheme(self, model: str) -> KeyScheme | None:
        """How to name chunks of this model's prompts; None: no worker whose names we can make."""
        return majority_scheme(self.workers_for(model))

    def mark_down(self, worker_id: str) -> None:
        """A request could not connect: no traffic until /health answers again.  Unknown ids are fine."""
        known = self._known.get(worker_id)
        if known is not None and known.ready:
            log.warning("worker %s is down", worker_id)
            known.ready = False
            self._publish()

    def distrust(self, worker_id: str) -> None:
        """Its tokens or chunk names are not ours: never count on a hit there until it restarts."""
        if (known := self._known.get(worker_id)) is not None:
            self._distrusted.add((worker_id, known.worker.boot_id))
            known.worker = replace(known.worker, trusted=False)
            self._publish()

    def describe(self) -> list[dict[str, Any]]:
        """Every known worker, ready or not, in plain types."""
        return [
            {
                "id": known.worker.id,
                "url": known.worker.url,
                "model": known.worker.model,
                "state": "ready" if known.ready else "down",
                "stale": known.worker.stale,
                "leased": known.leased,
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

    async def refresh(self) -> None:
        """Read the leases, then ask those who must prove themselves."""
        await self._read_leases()
        asked = [known for known in self._known.values() if not self._vouched(known)]
        answers = await asyncio.gather(*(self._healthy(known.worker) for known in asked))
        for known, healthy in zip(asked, answers, strict=True):
            if healthy != known.ready:
                log.info("worker %s is %s", known.worker.id, "ready" if healthy else "not ready")
            known.ready = healthy
        self._publish()

    async def run(self) -> None:
        """Look every `interval` seconds, for ever."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.refresh()
            except Exception:  # the top of a task: discovery must outlive a bug in it
                log.exception("registry")

    async def _read_leases(self) -> None:
        if self._fleet is None:
            return
        try:
            leases = await self._fleet.read()
        except IndexDown as exc:
            log.debug("keeping the last known workers: %s", exc)
            for known in self._leased():
                known.worker = replace(known.worker, stale=True)
            return
        seen = set()
        for lease in leases:
            try:
                worker = from_lease(lease)
            except ValueError as exc:
                log.warning("ignoring a lease: %s", exc)
                continue
            seen.add(worker.id)
            self._meet(worker)
        self._miss(seen)

    def _meet(self, worker: Worker) -> None:
        if (worker.id, worker.boot_id) in self._distrusted:
            worker = replace(worker, trusted=False)
        known = self._known.get(worker.id)
        # a new process, or a new address, has to prove itself: it may beat before it listens
        if known is None or (known.worker.boot_id, known.worker.url) != (worker.boot_id, worker.url):
            if not worker.trusted:
                log.warning(
                    "worker %s names chunks in another way; it gets no cache-aware traffic", worker.id
                )
            self._known[worker.id] = _Known(worker, leased=True)
        else:
            known.worker, known.leased, known.gone_since = worker, True, None

    def _miss(self, seen: set[str]) -> None:
        now = self._clock()
        for known in self._leased():
            worker = known.worker
            if worker.id in seen:
                continue
            if known.gone_since is None:
                known.gone_since = now
                known.worker = replace(worker, stale=True)
            if now - known.gone_since > STALE_SECONDS:
                del self._known[worker.id]
                self._distrusted = {held for held in self._distrusted if held[0] != worker.id}
                log.info("worker %s left", worker.id)
                self._on_leave(worker.id)

    def _leased(self) -> list[_Known]:
        return [known for known in self._known.values() if known.leased]

    def _vouched(self, known: _Known) -> bool:
        """A fresh lease speaks for a worker that was ready; everybody else is asked."""
        return known.ready and known.leased and not known.worker.stale

    async def _healthy(self, worker: Worker) -> bool:
        try:
            reply = await self._http.get(f"{worker.url}/health", timeout=HEALTH_SECONDS)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    def _publish(self) -> None:
        leased = {known.worker.url for known in self._leased()}
        self._ready = tuple(
            known.worker
            for _, known in sorted(self._known.items())
            if known.ready and (known.leased or known.worker.url not in leased)
        )
