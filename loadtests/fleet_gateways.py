"""What stands between a trace and a simulated fleet: gateways with the real router in them, the index their
look-ups ask, and the heartbeats they hear.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import httpx

from cacheengine.index_schema import Depths, Entry, Lease, WorkerInfo
from cacheengine.index_wire import Wire
from cacheengine.keys import ChunkKey, KeyScheme, Namespace, namespace_of, probe_keys
from loadtests import fleet_sim
from loadtests.fleet_sim import CHUNK_TOKENS, Clock, Request, SimWorker
from router.load import LoadBoard
from router.registry import Registry
from router.router import Router

SCHEME = KeyScheme(namespace_of({"bench": "replay_routing"}), CHUNK_TOKENS)
REGISTRY_SECONDS = 0.25  # between two readings of the heartbeats


class Holders(Protocol):
    """What a Router asks of an IndexReader."""

    async def holders(
        self, namespace: Namespace, keys: Sequence[ChunkKey]
    ) -> dict[tuple[str, int], Depths]: ...


def info(number: int) -> WorkerInfo:
    return WorkerInfo(
        f"w{number:04}",
        f"http://w{number:04}:1",
        "m",
        "/m",
        SCHEME.namespace.hex(),
        CHUNK_TOKENS,
        tuple(probe_keys(SCHEME)),
        payload_bytes=CHUNK_TOKENS * fleet_sim.TOKEN_BYTES,
        tiers=("device", "host", "disk", "redis"),
        boot_id=str(number),
        epoch=1,
    )


class Scribe:
    """Writes the workers' news to the real index, `INDEX_SECONDS` of virtual time after they happened."""

    def __init__(self, url: str, clock: Clock, workers: int) -> None:
        self._clock, self._news = clock, deque[tuple[float, int, Sequence[Entry]]]()
        self._wire, self._infos = Wire(url, 1800, {}), [info(n) for n in range(workers)]

    def publish(self, worker: int, entries: Sequence[Entry]) -> None:
        self._news.append((self._clock.now + fleet_sim.INDEX_SECONDS, worker, entries))

    def write(self) -> None:
        """Everything due by now; the last word on a chunk wins."""
        latest: dict[int, dict[bytes, Entry]] = {}
        while self._news and self._news[0][0] <= self._clock.now:
            _, worker, entries = self._news.popleft()
            latest.setdefault(worker, {}).update({entry.key: entry for entry in entries})
        for worker, held in latest.items():
            self._wire.write(self._infos[worker], list(held.values()))

    def close(self) -> None:
        self._wire.close()


class Twin:
    """The index in this process, `INDEX_SECONDS` late as well: the same answers without a server, for sweeps
    over many fleets."""

    def __init__(self, clock: Clock, workers: int) -> None:
        self._clock, self._news = clock, deque[tuple[float, int, Sequence[Entry]]]()
        self._held = [dict[bytes, int]() for _ in range(workers)]
        self._names = [(info(n).worker_id, 1) for n in range(workers)]

    def publish(self, worker: int, entries: Sequence[Entry]) -> None:
        self._news.append((self._clock.now + fleet_sim.INDEX_SECONDS, worker, entries))

    def write(self) -> None:
        """Everything due by now."""
        while self._news and self._news[0][0] <= self._clock.now:
            _, worker, entries = self._news.popleft()
            held = self._held[worker]
            for entry in entries:
                if entry.bits:
                    held[entry.key] = entry.bits
                else:
                    held.pop(entry.key, None)

    async def holders(self, namespace: Namespace, keys: Sequence[ChunkKey]) -> dict[tuple[str, int], Depths]:
        """As IndexReader.holders()."""
        found = {}
        for name, held in zip(self._names, self._held, strict=True):
            if keys and keys[0] in held:
                lo, hi = 1, len(keys) if len(keys) == 1 or keys[1] in held else 1
                while lo < hi:
                    mid = (lo + hi + 1) // 2
                    lo, hi = (mid, hi) if keys[mid - 1] in held else (lo, mid - 1)
                bits = [held[key] for key in keys[:lo]]
                found[name] = Depths(
                    *(max((i for i, b in enumerate(bits, 1) if b & bit), default=0) for bit in (1, 2, 4, 8))
                )
        return found

    def close(self) -> None:
        pass


class Beats:
    """What the leases say, as a Registry asks for it."""

    def __init__(self, clock: Clock, workers: Sequence[SimWorker]) -> None:
        self._clock, self.leases = clock, [Lease(info(worker.number), {}) for worker in workers]
        for worker in workers:
            self._beat(worker, worker.number / len(workers) * fleet_sim.BEAT_SECONDS)

    def _beat(self, worker: SimWorker, following: float) -> None:
        held = {name: str(value) for name, value in worker.beat().items()}
        held["beat_ms"] = str(1000 * self._clock.now + 1)
        self.leases[worker.number] = Lease(self.leases[worker.number].info, held)
        self._clock.at(following, lambda: self._beat(worker, following + fleet_sim.BEAT_SECONDS))

    async def read(self) -> list[Lease]:
        return list(self.leases)


class Gateway:
    """What one gateway process has: everything but its HTTP."""

    def __init__(self, clock: Clock, beats: Beats, index: Holders, policy: str, phase: float) -> None:
        self._clock, self._beats, self._refresh_at = clock, beats, 0.0
        self._phase = phase
        self._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200)))
        self._registry = Registry(self._http, beats, clock=clock)  # type: ignore[arg-type]
        self.board = LoadBoard()
        self.router = Router(self._registry, self.board, index, policy, clock)  # type: ignore[arg-type]

    async def send(self, request: Request) -> int:
        """Place it; returns the worker's number.  The request tells the load board of its fate."""
        if self._clock.now >= self._refresh_at:
            await self._registry.refresh()
            turns = (self._clock.now - self._phase) // REGISTRY_SECONDS + 1
            self._refresh_at = self._phase + turns * REGISTRY_SECONDS
        order = await self.router.place("m", request.prompt, request.tokens, session=request.session)
        best = order[0]
        ticket = self.board.start(best.worker.id, request.tokens, best.expected_hit_tokens)
        request.on_first = lambda _: ticket.first_byte()
        request.on_done = lambda _: ticket.done()
        return int(best.worker.id[1:])

    async def close(self) -> None:
        await self._http.aclose()
