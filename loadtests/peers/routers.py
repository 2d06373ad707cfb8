"""Cairn's gateway against vllm-router 0.1.17 and smg 1.13.0.   python -m loadtests.peers.routers [--quick]

The question: the same workers and the same trace of real conversations; in front of which gateway do users
wait least for their first token, and what does it cost?
The ceiling: the hit rate of one cache as large as all workers' together.

Workers are native mocks (loadtests/mock_worker.py) that emulate a prefix cache and serial prefill; they and
the gateway start anew for every run, so every cache and every routing table is empty.  Prompts are text: the
peers see characters, as in production.  Lengths are divided by --shrink, arrivals scaled so that a router
with the ceiling's hit rate would keep the workers busy for the named share of the time, and requests are sent
when they are due, answered or not.  Every gateway has its turn at every place of a round.

The sample in the repository is thin (a thirtieth of the traffic): scaled to saturation its users ask again
before their last prompt is computed.  It is for a first look; the full trace is for figures: see
loadtests/data/README.md, and --trace FILE --requests N.

Bars: TTFT p50 and p90, Cairn's divided by that of each peer's best policy, run by run, median of the rounds.
docs/peers.md has the last full run and what the comparison cannot say.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.engine import sentence_on_failure
from loadtests.peers.lines import rotated
from loadtests.peers.routers_client import Client
from loadtests.peers.routers_lab import (
    CAIRN,
    ROUTERS,
    SMG,
    VLLM,
    Fleet,
    Router,
    RouterLab,
    counts,
    cpu_seconds,
)
from loadtests.peers.routers_trace import Ask, load, pooled_hits
from loadtests.replay_eviction import SAMPLE
from loadtests.report import Bar, finish

LOADS = {"low": 0.25, "middle": 0.6, "near": 0.85}  # share of the time an ideal fleet would compute
WARM = 0.1  # of the requests: caches and connections come up; asked but not counted
LEVEL = 1.05  # at low load everybody is fast: as good as, within 5 %
QUICK = ("cairn predicted_ttft", "vllm-router cache_aware, tight", "smg cache_aware, tight")
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """One gateway under one load."""

    p50: float  # seconds to the first token, as are the next two
    p90: float
    p99: float
    hit_rate: float
    hotspot: float
    cpu: float  # seconds of the gateway per 1,000 requests
    errors: int
    late: float  # p99 of how late the client sent

    def results(self) -> Iterator[tuple[str, float]]:
        for name in ("p50", "p90", "p99"):
            yield f"TTFT {name} ms", 1e3 * getattr(self, name)
        yield "hit rate", self.hit_rate
        yield "hotspot", self.hotspot
        yield "gateway CPU s / 1,000 requests", self.cpu
        yield "errors", self.errors
        yield "client late p99 ms", 1e3 * self.late


Runs = dict[tuple[str, str], list[Run]]  # (load, router) → one a round


@dataclass(frozen=True)
class Plan:
    """What is asked, and how fast at full load."""

    asks: Sequence[Ask]
    ceiling: float  # hit rate
    full: float  # trace seconds per second that keep an ideal fleet busy

    @classmethod
    def of(cls, asks: Sequence[Ask], fleet: Fleet, shrink: int) -> "Plan":
        ceiling = pooled_hits(asks, fleet.workers * fleet.capacity, fleet.chunk_tokens, shrink)
        seconds = sum(ask.tokens for ask in asks) * (1 - ceiling) / (fleet.workers * fleet.prefill_rate)
        return cls(asks, ceiling, asks[-1].at / seconds)


def measure(lab: RouterLab, router: Router, plan: Plan, share: float, redis_url: str) -> Run:
    """One run on fresh processes.  Raises BenchFailed."""
    with lab.workers(redis_url) as urls, lab.router(router, urls, redis_url) as (child, port):
        client = Client(port, router.headers)
        counted, spent = counts(urls), cpu_seconds(child.pid)
        outcome = asyncio.run(
            client.run(plan.asks, plan.full * share, int(WARM * len(plan.asks)), _PATIENCE_SECONDS)
        )
        spent, counted = cpu_seconds(child.pid) - spent, counts(urls).since(counted)
    for error in outcome.errors[:3]:
        lab.board.say(f"  {router.name}: {error}")
    late = statistics.quantiles(outcome.late, n=100)[98]
    return Run(
        *(outcome.percentile(percent) for percent in (50, 90, 99)),
        hit_rate=counted.hit_rate,
        hotspot=counted.hotspot,
        cpu=1000 * spent / len(plan.asks),
        errors=len(outcome.errors),
        late=late,
    )


def bars(runs: Runs) -> dict[str, Bar]:
    """Against each peer's best policy at that load, by its own median."""
    found = {}
    for level in dict.fromkeys(level for level, _ in runs):
        ours = next(runs[key] for key in runs if key[0] == level and ROUTERS[key[1]].side == CAIRN)
        for side in (VLLM, SMG):
            theirs = {key[1]: runs[key] for key in runs if key[0] == level and ROUTERS[key[1]].side == side}
            for name in ("p50", "p90") if theirs else ():
                best = min(theirs, key=lambda router: _median(theirs[router], name))
                ratios = [
                    getattr(a, name) / getattr(b, name) for a, b in zip(ours, theirs[best], strict=True)
                ]
                label = f"{level} load, TTFT {name}, Cairn / {best}"
                found[label] = Bar(statistics.median(ratios), LEVEL if level == "low" else 1.0, "lower")
    errors = sum(run.errors for key, held in runs.items() if ROUTERS[key[1]].side == CAIRN for run in held)
    return found | {"Cairn's errors": Bar(errors, 0, "lower")}


def table(runs: Runs, plan: Plan) -> Table:
    """Medians of the rounds; below, the smallest and the largest."""
    title = f"{len(plan.asks)} requests a run; one pooled cache would hit {plan.ceiling:.1%}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    names = (
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "hit rate",
        "hotspot",
        "CPU s / 1,000",
        "errors",
        "late p99 ms",
    )
    for name in ("load", "gateway", *names):
        made.add_column(name, justify="left" if name in ("load", "gateway") else "right")
    for (level, router), held in runs.items():
        columns = zip(*((value for _, value in run.results()) for run in held), strict=True)
        made.add_row(level, router, *map(_spread, columns))
    return made


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle}\n{min(values):.3g}–{max(values):.3g}"


def _median(held: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(run, name) for run in held)


def bench(args: argparse.Namespace) -> int:
    fleet = Fleet(workers=args.workers)
    runs: Runs = {(level, router): [] for level in args.loads for router in args.routers}
    console = Console(stderr=True)
    with RouterLab(console, fleet) as lab:
        lab.install()
        with lab.valkey(1) as redis_url:
            with lab.workers(""):  # writes the words
                words = [line.split()[0] for line in (lab.words / "vocabulary").read_text().splitlines()]
            plan = Plan.of(load(args.trace, words, args.shrink, args.requests), fleet, args.shrink)
            lab.board.say(f"one pooled cache would hit {plan.ceiling:.1%}")
            for turn in range(args.rounds):
                for level in args.loads:
                    for name in rotated(args.routers, turn):
                        run = measure(lab, ROUTERS[name], plan, LOADS[level], redis_url)
                        runs[level, name].append(run)
                        told = ", ".join(f"{what} {value:.3g}" for what, value in run.results())
                        lab.board.say(f"  {level} {name}: {told}")
    Console(width=170).print(table(runs, plan))
    results = {
        f"{level}, {router}, {what}": statistics.median(dict(run.results())[what] for run in held)
        for (level, router), held in runs.items()
        for what, _ in held[0].results()
    }
    return finish("routers", {"pooled hit rate": plan.ceiling, **results}, bars(runs))


def names_of(known: Sequence[str], text: str) -> list[str]:
    """Semicolons, for policies' names have commas.  Raises argparse's error for a name that is none."""
    names = [name.strip() for name in text.split(";")]
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {'; '.join(known)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="each at one policy, once, near saturation")
    parser.add_argument("--trace", type=Path, default=SAMPLE, help="jsonl as in loadtests/data/README.md")
    parser.add_argument("--requests", type=int, help="the first so many of the trace (default all)")
    parser.add_argument("--shrink", type=int, default=8, help="what lengths are divided by")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=lambda text: names_of(list(LOADS), text), default=list(LOADS))
    parser.add_argument("--routers", type=lambda text: names_of(list(ROUTERS), text), default=list(ROUTERS))
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.loads, args.routers, args.requests = 1, ["near"], list(QUICK), 200
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
