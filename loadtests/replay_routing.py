"""Which worker a prompt goes to, and what that costs.   python -m loadtests.replay_routing [--quick]

Replays a trace (--trace FILE: jsonl as in loadtests/data/README.md) through the real router: one Router,
LoadBoard and Registry for each of several gateways, and a real Valkey that holds the chunk index.  Requests
are dealt to the gateways at random.  The workers live in virtual time (loadtests/fleet_sim.py says how);
they write the index 20 ms after they stored something and beat every 2 s.

Load 0.9 means: computing what the oracle does not find keeps every worker busy for nine tenths of the time.
The oracle is one pooled LRU with as many slots as all tiers of the fleet together, the shared one included,
which learns of a prompt the moment it arrives; beside it stands what a cache without bound would find.

* hits: tokens found ÷ the oracle's.   unbounded: tokens found ÷ those of a cache without bound.
* precise: of the requests for which it made a difference, how many went to a worker that held as much of the
  prompt in its own tiers as any.
* hotspot: workers × the largest worker's share of the requests; 1 is even.
* TTFT: arrival to first token, in virtual seconds.

Starts its own Valkey on a unix socket unless --url names an *empty* server: it is flushed.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import redis
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cacheengine.index import Depths, Entry, IndexReader, IndexWriter, Lease, WorkerInfo
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from loadtests import arrivals, fleet_sim
from loadtests.arrivals import Arrivals
from loadtests.fleet_sim import CHUNK_TOKENS, Capacity, Clock, Request, SimWorker
from loadtests.micro.bench_index import own_server
from loadtests.report import Bar, finish
from router.load import LoadBoard
from router.policy import POLICIES
from router.registry import Registry
from router.router import Router

SAMPLE = Path(__file__).parent / "data" / "mooncake_sample.jsonl"
SCHEME = KeyScheme(namespace_of({"bench": "replay_routing"}), CHUNK_TOKENS)
DEFAULT = "predicted_ttft"
ONE_PROMPT = "one system prompt"
LOADS = (0.3, 0.6, 0.9)
REGISTRY_SECONDS = 1.0
SEED = 7


class Case(NamedTuple):
    policy: str
    workers: int
    gateways: int
    load: float
    trace: str = "trace"

    def __str__(self) -> str:
        return f"{self.policy} {self.trace} {self.workers}w {self.gateways}g {self.load:g}"


class Outcome(NamedTuple):
    hits: float
    unbounded: float
    precise: float
    busy: float
    gone: float
    passed: float
    hotspot: float
    p50: float
    p90: float
    p99: float
    seconds: float


Outcomes = dict[Case, Outcome]


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
        # never started: of a writer only the words it says to Redis are wanted, not its thread
        self._writers = [IndexWriter(url, info(n), 1800, 6, dict, list) for n in range(workers)]
        self._client = self._writers[0]._connect()
        for writer in self._writers[1:]:
            writer._write_script = self._writers[0]._write_script

    def publish(self, worker: int, entries: Sequence[Entry]) -> None:
        self._news.append((self._clock.now + fleet_sim.INDEX_SECONDS, worker, entries))

    def write(self) -> None:
        """Everything due by now; the last word on a chunk wins."""
        latest: dict[int, dict[bytes, Entry]] = {}
        while self._news and self._news[0][0] <= self._clock.now:
            _, worker, entries = self._news.popleft()
            latest.setdefault(worker, {}).update({entry.key: entry for entry in entries})
        for worker, held in latest.items():
            self._writers[worker]._write(self._client, list(held.values()))

    def close(self) -> None:
        self._client.close()


class Twin:
    """The index in this process: writer and reader of the same facts, without a server."""

    def __init__(self, clock: Clock, workers: int) -> None:
        self._clock, self._news = clock, deque[tuple[float, int, Sequence[Entry]]]()
        self._held = [dict[bytes, int]() for _ in range(workers)]
        self._names = [(info(n).worker_id, 1) for n in range(workers)]

    def publish(self, worker: int, entries: Sequence[Entry]) -> None:
        self._news.append((self._clock.now + fleet_sim.INDEX_SECONDS, worker, entries))

    def write(self) -> None:
        while self._news and self._news[0][0] <= self._clock.now:
            _, worker, entries = self._news.popleft()
            held = self._held[worker]
            for entry in entries:
                if entry.bits:
                    held[entry.key] = entry.bits
                else:
                    held.pop(entry.key, None)

    async def holders(self, namespace: bytes, keys: Sequence[ChunkKey]) -> dict[tuple[str, int], Depths]:
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

    def __init__(self, clock: Clock, beats: Beats, reader: IndexReader, policy: str, phase: float) -> None:
        self._clock, self._beats, self._refresh_at = clock, beats, 0.0
        self._phase = phase
        self._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200)))
        self._registry = Registry(self._http, beats, clock=clock)  # type: ignore[arg-type]
        self.board = LoadBoard()
        self.router = Router(self._registry, self.board, reader, policy, clock)

    async def send(self, request: Request, workers: Sequence[SimWorker]) -> int:
        """Place it and hand it over; returns the worker's number."""
        if self._clock.now >= self._refresh_at:
            await self._registry.refresh()
            turns = (self._clock.now - self._phase) // REGISTRY_SECONDS + 1
            self._refresh_at = self._phase + turns * REGISTRY_SECONDS
        best = (await self.router.place("m", request.prompt, request.tokens, session=request.session))[0]
        ticket = self.board.start(best.worker.id, request.tokens, best.expected_hit_tokens)
        request.on_first = lambda _: ticket.first_byte()
        request.on_done = lambda _: ticket.done()
        return int(best.worker.id[1:])

    async def close(self) -> None:
        await self._http.aclose()


class Bench:
    """One trace at its fleet sizes.  `share`: slots of the fleet ÷ distinct chunks of the trace."""

    def __init__(self, url: str, trace: Sequence[Request], share: float) -> None:
        self._url, self._trace = url, trace
        distinct = len(set(itertools.chain.from_iterable(request.prompt for request in trace)))
        self._slots = share * distinct
        self._tokens = sum(request.tokens for request in trace)
        self._unbounded = fleet_sim.oracle(trace, None)

    async def run(self, case: Case) -> Outcome:
        started = time.perf_counter()
        capacity = Capacity.of(self._slots, case.workers)
        best = fleet_sim.oracle(self._trace, capacity.total(case.workers))
        requests = arrivals.paced(self._trace, case.workers, case.load, self._tokens - best)
        clock = Clock()
        if self._url:
            with redis.Redis.from_url(self._url) as client:
                client.flushall()
            reader = IndexReader(self._url, deadline_ms=5000)
            if not await reader.open():
                raise SystemExit(f"no Redis or Valkey answers at {self._url}")
            scribe = Scribe(self._url, clock, case.workers)
        else:
            scribe = reader = Twin(clock, case.workers)
        workers = fleet_sim.fleet(clock, case.workers, capacity, scribe)
        beats = Beats(clock, workers)
        phases = [i / case.gateways * REGISTRY_SECONDS for i in range(case.gateways)]
        gateways = [Gateway(clock, beats, reader, case.policy, phase) for phase in phases]
        chance = random.Random(SEED)
        sent, mattered, precise, held, passed = Counter[int](), 0, 0, 0, 0
        arriving = Arrivals(requests)
        while (request := arriving.next(clock)) is not None:
            scribe.write()
            gateway = chance.choice(gateways)
            chosen = await gateway.send(request, workers)
            done = request.on_done
            request.on_done = lambda request, done=done: (done(request), arriving.answered(request, clock.now))
            sent[chosen] += 1
            depths = [worker.tiers.depth(request.prompt) for worker in workers]
            if max(depths) > min(depths):
                mattered += 1
                precise += depths[chosen] == max(depths)
            shared = workers[0].shared
            mine = min(shared.depth(request.prompt, depths[chosen]) * CHUNK_TOKENS, request.tokens)
            anybody = min(max(shared.depth(request.prompt, d) for d in {max(depths), depths[chosen]}) * CHUNK_TOKENS, request.tokens)
            held += anybody
            passed += anybody - mine
            workers[chosen].arrive(request)
        span = clock.now
        while any(request.ttft == 0 for request in requests):
            clock.advance(clock.now + 60)
        scribe.close()
        if self._url:
            await reader.close()
        for gateway in gateways:
            await gateway.close()
        found = sum(request.hit for request in requests)
        cuts = statistics.quantiles((request.ttft for request in requests), n=100, method="inclusive")
        return Outcome(
            hits=found / best if best else 1.0,
            unbounded=found / self._unbounded if self._unbounded else 1.0,
            precise=precise / mattered if mattered else 1.0,
            busy=sum(worker.busy for worker in workers) / span / case.workers,
            gone=1 - held / best,
            passed=passed / best,
            hotspot=case.workers * max(sent.values()) / len(requests),
            p50=cuts[49],
            p90=cuts[89],
            p99=cuts[98],
            seconds=time.perf_counter() - started,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, default=SAMPLE)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--workers", default="4,16,64")
    parser.add_argument("--gateways", default="1,8")
    parser.add_argument("--loads", default="0.3,0.6,0.9")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--one", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.one:
        trace = arrivals.one_system_prompt(args.one)
    else:
        trace = arrivals.load(args.trace)
    if args.first:
        trace = trace[: args.first] if args.first > 1 else trace
    with contextlib.nullcontext("") if args.twin else own_server() as url:
        bench = Bench(url, trace, args.share)
        print("%-14s %4s %3s %5s  hits  unbnd precise busy gone passed hotspot p50 p90 p99 secs" % ("policy", "W", "G", "load"))
        for w in map(int, args.workers.split(",")):
            for load in map(float, args.loads.split(",")):
                for g in map(int, args.gateways.split(",")):
                    for p in args.policies.split(","):
                        o = asyncio.run(bench.run(Case(p, w, g, load)))
                        print("%-14s %4d %3d %5.2f " % (p, w, g, load), " ".join("%6.3f" % v for v in o), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
