"""Which worker a prompt goes to, and what that costs.   python -m loadtests.replay_routing [--quick]

Replays a trace (--trace FILE: jsonl as in loadtests/data/README.md) through the real router: one Router,
LoadBoard and Registry for each of several gateways, and a real Valkey that holds the chunk index.  Requests
are dealt to the gateways at random.  The workers live in virtual time (loadtests/fleet_sim.py says how);
they write the index 20 ms after they stored something and beat four times a second.  A prompt that continues
another comes at its time in the trace, but not before that one was answered.  `session` is told which prompts
belong together, the other policies are not.

Load 0.9 means: computing what the oracle does not find keeps every worker busy for nine tenths of the time.
The oracle is one pooled LRU with as many slots as all tiers of the fleet together, the shared one included,
which learns of a prompt the moment it arrives; beside it stands what a cache without bound would find.

* hits: tokens found ÷ the oracle's.   unbounded: tokens found ÷ those of a cache without bound.
* passed over: tokens that some worker held at that moment and the chosen one did not ÷ the oracle's.
* precise: of the requests for which it made a difference, how many went to a worker that held as much of the
  prompt in its own tiers as any.
* hotspot: workers × the largest worker's share of the requests; 1 is even.
* busy: share of the time that workers computed.
* TTFT: arrival to first token, in virtual seconds.

By default the default policy runs with every number of gateways, the others with the least and the most.
--twin looks up in an index inside this process instead: the same decisions, faster; for wide sweeps.

Starts its own Valkey on a unix socket unless --url names an *empty* server: it is flushed.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import redis
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cacheengine.index_reader import IndexReader
from loadtests import arrivals, fleet_sim
from loadtests.arrivals import Arrivals
from loadtests.fleet_gateways import REGISTRY_SECONDS, Beats, Gateway, Scribe, Twin
from loadtests.fleet_sim import CHUNK_TOKENS, Capacity, Clock, Request, SimWorker
from loadtests.micro.bench_index import own_server
from loadtests.report import Bar, finish
from router.policy import POLICIES

SAMPLE = Path(__file__).parent / "data" / "mooncake_sample.jsonl"
DEFAULT = "predicted_ttft"
TRACE, ONE_PROMPT = "trace", "one system prompt"
ONE_PROMPT_WORKERS, ONE_PROMPT_LOAD = 16, 0.6
SHARE = 0.6  # slots of the fleet ÷ distinct chunks of the trace
HITS = 0.97
QUICK_HITS = 0.93  # the sample's hour is squeezed into two minutes: its turns press on each other
SEED = 7


class Case(NamedTuple):
    requests: str
    policy: str
    workers: int
    gateways: int
    load: float

    def __str__(self) -> str:
        return (
            f"{self.requests}: {self.policy}, {self.workers} workers, {self.gateways} gateways, {self.load:g}"
        )


class Outcome(NamedTuple):
    hits: float
    unbounded: float
    passed_over: float
    precise: float
    hotspot: float
    busy: float
    p50: float
    p90: float
    p99: float


Outcomes = dict[Case, Outcome]


class Tally:
    """What one run amounts to."""

    def __init__(self, workers: Sequence[SimWorker]) -> None:
        self._workers = workers
        self.sent = Counter[int]()
        self.passed_over = self._mattered = self._precise = 0

    def chosen(self, request: Request, number: int) -> None:
        """Call before the worker hears of it."""
        self.sent[number] += 1
        shared, prompt = self._workers[0].shared, request.prompt
        depths = [worker.tiers.depth(prompt) for worker in self._workers]
        most = max(depths)
        if most > min(depths):
            self._mattered += 1
            self._precise += depths[number] == most
        at_most, here = (
            min(shared.depth(prompt, depth) * CHUNK_TOKENS, request.tokens)
            for depth in (most, depths[number])
        )
        self.passed_over += max(0, at_most - here)

    @property
    def precise(self) -> float:
        return self._precise / self._mattered if self._mattered else 1.0


class Bench:
    """One list of requests before fleets of any size.  `url` "": look up in a twin of the index."""

    def __init__(self, url: str, requests: Sequence[Request], share: float) -> None:
        self._url, self._requests = url, requests
        distinct = len(set(itertools.chain.from_iterable(request.prompt for request in requests)))
        self._slots = share * distinct
        self._tokens = sum(request.tokens for request in requests)
        self._unbounded = fleet_sim.oracle(requests, None)

    async def run(self, case: Case) -> Outcome:
        capacity = Capacity.of(self._slots, case.workers)
        best = fleet_sim.oracle(self._requests, capacity.total(case.workers))
        requests = arrivals.paced(self._requests, case.workers, case.load, self._tokens - best)
        clock = Clock()
        async with contextlib.AsyncExitStack() as stack:
            index, told = await self._index(stack, clock, case.workers)
            workers = fleet_sim.fleet(clock, case.workers, capacity, told)
            tally, beats = Tally(workers), Beats(clock, workers)
            gateways = []
            for i in range(case.gateways):
                phase = i / case.gateways * REGISTRY_SECONDS
                gateways.append(Gateway(clock, beats, index, case.policy, phase))
                stack.push_async_callback(gateways[-1].close)
            span = await _replay(requests, clock, gateways, workers, told, tally)
        found = sum(request.hit for request in requests)
        cuts = statistics.quantiles((request.ttft for request in requests), n=100, method="inclusive")
        return Outcome(
            hits=found / best if best else 1.0,
            unbounded=found / self._unbounded if self._unbounded else 1.0,
            passed_over=tally.passed_over / best if best else 0.0,
            precise=tally.precise,
            hotspot=case.workers * max(tally.sent.values()) / len(requests),
            busy=sum(worker.busy for worker in workers) / span / case.workers,
            p50=cuts[49],
            p90=cuts[89],
            p99=cuts[98],
        )

    async def _index(
        self, stack: contextlib.AsyncExitStack, clock: Clock, workers: int
    ) -> tuple[IndexReader | Twin, Scribe | Twin]:
        """Who is asked, and who is told."""
        if not self._url:
            twin = Twin(clock, workers)
            return twin, twin
        with redis.Redis.from_url(self._url) as client:
            client.flushall()
        reader = IndexReader(self._url, deadline_ms=5000)  # a busy machine must not decide where prompts go
        stack.push_async_callback(reader.close)
        if not await reader.open():
            raise SystemExit(f"no Redis or Valkey answers at {self._url}")
        scribe = Scribe(self._url, clock, workers)
        stack.callback(scribe.close)
        return reader, scribe


async def _replay(
    requests: Sequence[Request],
    clock: Clock,
    gateways: Sequence[Gateway],
    workers: Sequence[SimWorker],
    told: Scribe | Twin,
    tally: Tally,
) -> float:
    """Returns the virtual seconds until the last first token."""
    chance, arriving = random.Random(SEED), Arrivals(requests)
    while (request := arriving.next(clock)) is not None:
        told.write()
        number = await chance.choice(gateways).send(request)
        arriving.watch(request, clock)
        tally.chosen(request, number)
        workers[number].arrive(request)
    while any(request.ttft == 0 for request in requests):
        clock.step()
    return clock.now


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gateways = sorted(args.gateways)
    for workers, load, policy in itertools.product(args.workers, args.loads, args.policies):
        few = sorted({gateways[0], gateways[-1]})
        for n in gateways if policy == DEFAULT or args.full else few:
            yield Case(TRACE, policy, workers, n, load)
    policies = [policy for policy in args.policies if policy == DEFAULT or not args.quick]
    for policy, n in itertools.product(policies, sorted({gateways[0], gateways[-1]})):
        yield Case(ONE_PROMPT, policy, ONE_PROMPT_WORKERS, n, ONE_PROMPT_LOAD)


def table(outcomes: Outcomes, requests: str) -> Table:
    shown = Table(title=requests, box=box.SIMPLE_HEAD)
    for name in ("workers", "gateways", "load", "policy"):
        shown.add_column(name, justify="left" if name == "policy" else "right")
    for name in Outcome._fields:
        shown.add_column(name.replace("_", " "), justify="right")
    rows = {case: row for case, row in outcomes.items() if case.requests == requests}
    for case, row in sorted(rows.items(), key=lambda each: (each[0].workers, each[0].load, each[0].gateways)):
        first = *map(str, (case.workers, case.gateways, case.load)), case.policy
        shown.add_row(*first, *(f"{value:.3f}" for value in row))
    return shown


def bars(outcomes: Outcomes, hits: float) -> dict[str, Bar]:
    """The worst of the default policy's runs, each beside the best other policy in the same fleet."""
    found: dict[str, Bar] = {}
    traced = {case: row for case, row in outcomes.items() if case.requests == TRACE}
    mine = {case: row for case, row in traced.items() if case.policy == DEFAULT}
    for n in sorted({case.gateways for case in mine}):
        worst = min(row.hits for case, row in mine.items() if case.gateways == n)
        found[f"hits / oracle, {n} gateways"] = Bar(worst, hits)
    for load in sorted({case.load for case in mine}):
        ratios = [
            row.p90 / min(rivals)
            for case, row in mine.items()
            if case.load == load
            and (rivals := [other.p90 for at, other in traced.items() if at[2:] == case[2:] and at != case])
        ]
        if ratios:
            found[f"TTFT p90 / best other policy, load {load:g}"] = Bar(max(ratios), 1.0, "lower")
    if hot := [row.hotspot for case, row in outcomes.items() if case[:2] == (ONE_PROMPT, DEFAULT)]:
        found["hotspot, one system prompt"] = Bar(max(hot), 1.3, "lower")
    return found


def numbers(kind: type[int] | type[float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(part) for part in text.split(",")]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, default=SAMPLE, help="jsonl; the sample when left out")
    parser.add_argument("--quick", action="store_true", help="4 workers, two loads, 1 and 8 gateways")
    parser.add_argument("--full", action="store_true", help="every policy with every number of gateways")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES))
    parser.add_argument("--workers", type=numbers(int), help="fleet sizes, with commas (4,16,64)")
    parser.add_argument("--gateways", type=numbers(int), help="how many of them, with commas (1,2,4,8)")
    parser.add_argument("--loads", type=numbers(float), help="with commas (0.3,0.6,0.9)")
    parser.add_argument("--share", type=float, default=SHARE, help="slots of the fleet ÷ distinct chunks")
    parser.add_argument("--twin", action="store_true", help="no Valkey: an index inside this process")
    parser.add_argument("--url", help="an empty Redis or Valkey, which is flushed (default: our own)")
    args = parser.parse_args(given)
    if unknown := set(args.policies) - set(POLICIES):
        parser.error(f"no policy {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    args.workers = args.workers or ([4] if args.quick else [4, 16, 64])
    args.gateways = args.gateways or ([1, 8] if args.quick else [1, 2, 4, 8])
    args.loads = args.loads or ([0.3, 0.6] if args.quick else [0.3, 0.6, 0.9])
    args.users = 2000 if args.quick else 3000
    return args


def main(given: Sequence[str] | None = None) -> int:
    args, outcomes = arguments(given), Outcomes()
    requests = {TRACE: arrivals.load(args.trace), ONE_PROMPT: arrivals.one_system_prompt(args.users)}
    print(f"{args.trace.name}: {len(requests[TRACE])} requests")
    server = contextlib.nullcontext("" if args.twin else args.url) if args.twin or args.url else own_server()
    with server as url:
        benches = {name: Bench(url, each, args.share) for name, each in requests.items()}
        for case in track(list(cases(args)), "replaying", console=Console(stderr=True)):
            outcomes[case] = asyncio.run(benches[case.requests].run(case))
    for name in requests:
        Console(width=140).print(table(outcomes, name))
    results = {
        f"{case}: {name}": value for case, row in outcomes.items() for name, value in row._asdict().items()
    }
    return finish("replay_routing", results, bars(outcomes, QUICK_HITS if args.quick else HITS))


if __name__ == "__main__":
    sys.exit(main())
