"""Looks once a second for workers that take requests and do nothing with them.

Engine: its heartbeats go on (another thread writes them), say that requests run, and the count of tokens it
was given to compute has stood still for `seconds`.  Wedged: no new requests until the count moves.  Time is
the heartbeats' own, so that a Redis which does not answer makes nobody look wedged.

Server: requests of ours are open, none was answered for `seconds`, and /health does not answer either.  Then
the worker is down as the registry has it, although its lease is fresh: vLLM's HTTP server and the engine,
which keeps the lease, are two processes.  A worker without a lease is asked for its /health every second
anyway.

The last worker of a model is never taken.
"""

import asyncio
import logging
from typing import NamedTuple

from gateway.health import Health
from router.load import LoadBoard
from router.probe import Probe
from router.registry import Registry
from router.worker import Worker

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class _Moved(NamedTuple):
    """When the count last moved, or nothing ran."""

    boot_id: str
    tokens: float
    beat_ms: float


class Watch:
    """REQUIRES: used from one event loop."""

    def __init__(
        self, registry: Registry, board: LoadBoard, health: Health, probe: Probe, seconds: float
    ) -> None:
        """`seconds` 0: watch nobody."""
        self._registry, self._board, self._health, self._probe = registry, board, health, probe
        self._seconds = seconds
        self._moved: dict[str, _Moved] = {}

    async def run(self) -> None:
        """For ever."""
        while self._seconds:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except Exception:  # the top of a task: the watch must outlive a bug in it
                log.exception("watch")

    async def look(self) -> None:
        """Once."""
        workers = self._registry.snapshot()
        for worker in workers:
            self._look_at_engine(worker)
        for gone in self._moved.keys() - {worker.id for worker in workers}:
            del self._moved[gone]
        await asyncio.gather(*map(self._ask_server, filter(self._silent, workers)))

    def _look_at_engine(self, worker: Worker) -> None:
        load = worker.load
        if worker.stale or "computed_tokens" not in worker.beat:
            return
        was = self._moved.get(worker.id)
        now = _Moved(worker.boot_id, load.computed_tokens, load.beat_ms)
        wedged = self._health.state(worker.id) == "wedged"
        if not load.running or was is None or now[:2] != was[:2]:
            self._moved[worker.id] = now
            if wedged:
                log.info("worker %s computes again", worker.id)
                self._health.wedge(worker.id, False)
        elif not wedged and load.beat_ms - was.beat_ms >= 1000 * self._seconds:
            log.warning(
                "worker %s runs %d requests and has computed nothing for %g s; it gets no more until it does",
                worker.id,
                load.running,
                self._seconds,
            )
            self._health.wedge(worker.id, True)

    def _silent(self, worker: Worker) -> bool:
        if not self._board.inflight(worker.id):
            self._health.heard(worker.id)
        return self._health.quiet(worker.id) >= self._seconds

    async def _ask_server(self, worker: Worker) -> None:
        if await self._probe.healthy(worker.url, True):
            self._health.heard(worker.id)
            return
        others = self._registry.workers_for(worker.model)
        if len(others) > 1:
            log.warning("worker %s answers neither requests nor /health", worker.id)
            self._registry.mark_down(worker.id)
