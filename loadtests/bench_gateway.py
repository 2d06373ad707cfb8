"""What the gateway adds to a request, beside its peers.   python -m loadtests.bench_gateway [--quick]

The question: the same request, asked straight and through each gateway in turns: how much later is the first
byte, how many requests and streams pass, and what do a thousand requests and a thousand chunks cost in CPU?
The ceiling: the same client straight at the worker, in the same turns.

Worker and client are native (mock_worker.py, loadgen.py), one thread each, so neither is what is measured;
on two cores they still take their share of the machine from whatever is between them.  Every gateway is one
process with what it does anyway (metrics, health checks, accounts); Cairn with its default policy, the peers
with round robin.  `keyed` puts Cairn in front of workers with chunks in an index: chat template, tokenizer,
keys, look-up.  Loop lag is how long GET /health takes, asked every 20 ms while the load runs.

--long adds 100,000 requests of which a tenth is aborted, and looks at the memory after each quarter.
"""

import argparse
import contextlib
import json
import random
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.launch.processes import Child
from loadtests.engine import BenchFailed, sentence_on_failure
from loadtests.loadgen import Generator, Load, Seen
from loadtests.memory import of_group
from loadtests.peers.lines import rotated
from loadtests.peers.routers_lab import CAIRN, CARRIERS, SMG, VLLM, Fleet, Router, RouterLab, cpu_seconds
from loadtests.probe import Probe
from loadtests.report import Bar, finish

DIRECT = "direct"
ROUTERS = (
    Router(CAIRN, "predicted_ttft"),
    Router(VLLM, "round_robin"),
    Router(SMG, "round_robin"),
    *(Router(name, "predicted_ttft") for name in CARRIERS),  # only when named
)
AT_ONCE = 1e12  # tokens/s: a worker that does not wait
KIB = 1024


class Case(NamedTuple):
    """One kind of load.  `decode`: tokens/s of a stream; `words`: of the prompt, six bytes each."""

    name: str
    bytes: int
    load: Load
    stream: bool = False
    tokens: int = 1
    decode: float = AT_ONCE
    keyed: bool = False
    turns: int = 1  # messages the prompt is divided into


def cases(quick: bool) -> list[Case]:
    """In the order they run; those of one kind of worker together."""
    brief, some = (0.6, 1.0) if quick else (2.0, 3.0)
    one = Load(1, brief)
    found = [
        Case("1 KB, C=1", KIB, one),
        Case("1 KB, C=1, stream", KIB, one, stream=True, tokens=4),
        Case("32 KB, C=1", 32 * KIB, one),
        Case("400 KB, C=1", 400 * KIB, one),
        Case("1 KB, C=32", KIB, Load(32, brief)),
        Case("1 KB, C=32, stream", KIB, Load(32, brief), stream=True, tokens=64),
        Case("1 KB, C=64, stream at 100/s", KIB, Load(64, 3), stream=True, tokens=100, decode=100),
        Case("1 KB, keyed", KIB, one, keyed=True, turns=3),
        Case("8k tokens, keyed", 48 * KIB, one, keyed=True, turns=40),
    ]
    if quick:
        return found
    return [
        *found[:6],
        Case("32 KB, C=64", 32 * KIB, Load(64, some)),
        Case("400 KB, C=64", 400 * KIB, Load(64, some)),
        Case("1 KB, C=512", KIB, Load(512, some)),
        Case("1 KB, 300/s open", KIB, Load(1, some, rate=300)),
        Case("1 KB, 10 % aborts, C=64, stream", KIB, Load(64, some, aborts=0.1), stream=True, tokens=64),
        Case("1 KB, 16 slow of 64, stream", KIB, Load(64, some, slow=16), stream=True, tokens=1000),
        found[6],
        Case("1 KB, C=64, stream at 20/s", KIB, Load(64, 6), stream=True, tokens=100, decode=20),
        Case("1 KB, C=512, stream at 20/s", KIB, Load(512, 6), stream=True, tokens=100, decode=20),
        Case("1 KB, 20/s open, stream at 20/s", KIB, Load(64, 6, rate=20), stream=True, tokens=60, decode=20),
        *found[7:],
    ]


@dataclass
class Turn:
    """One case once, through one gateway."""

    seen: Seen
    cpu: float = 0.0  # seconds of the gateway
    lag: float = 0.0  # ms, p99
    rss: float = 0.0  # MiB


@dataclass
class Row:
    """All turns of one case: turns[side][i] belong to the same round."""

    case: Case
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def added(self, side: str, name: str = "ttfb_p50") -> list[float]:
        """Milliseconds on top of the same turn's direct ones."""
        pairs = zip(self.turns[side], self.turns[DIRECT], strict=True)
        return [getattr(a.seen, name) - getattr(b.seen, name) for a, b in pairs]

    def rate(self, side: str) -> list[float]:
        """Answers a second."""
        return [turn.seen.answered / turn.seen.seconds for turn in self.turns[side]]

    def cpu(self, side: str, per: str) -> list[float]:
        """Seconds per 1,000 `answered` or `events`."""
        return [1000 * turn.cpu / max(1, getattr(turn.seen, per)) for turn in self.turns[side]]


def body(case: Case, words: Sequence[str]) -> bytes:
    """A chat of about that many bytes in whole words, the same every time."""
    dice = random.Random(case.name)
    text, size = [], 0
    while size < case.bytes - 200:
        text.append(dice.choice(words))
        size += len(text[-1]) + 1
    each = -(-len(text) // case.turns)
    parts = [" ".join(text[i : i + each]) for i in range(0, len(text), each)]
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": part} for i, part in enumerate(parts)
    ]
    ask = {"model": "mock", "messages": messages, "max_tokens": case.tokens, "stream": case.stream}
    return json.dumps(ask).encode()


def measure(
    lab: RouterLab, generator: Generator, held: Sequence[Case], sides: Sequence[Router], rounds: int
) -> Iterator[Row]:
    """Cases that share workers, each gateway in turn.  Raises BenchFailed."""
    first = held[0]
    lab.fleet = Fleet(2, AT_ONCE, first.decode, 32, 4000)
    with contextlib.ExitStack() as opened:
        url = opened.enter_context(lab.valkey(1)) if first.keyed else ""
        urls = opened.enter_context(lab.workers(url))
        ports = {DIRECT: int(urls[0].rpartition(":")[2])}
        children: dict[str, Child] = {}
        for router in sides:
            children[router.side], ports[router.side] = opened.enter_context(lab.router(router, urls, url))
        words = [line.split()[0] for line in (lab.words / "vocabulary").read_text().splitlines()]
        for case in held:
            row, asked = Row(case), body(case, words)
            for side in ports:  # connections and memo come up
                generator.ask(ports[side], "/v1/chat/completions", asked, Load(2, 0.2))
            for number in range(rounds):
                for side in rotated(list(ports), number):
                    turn = _turn(generator, ports[side], asked, case, children.get(side))
                    row.turns.setdefault(side, []).append(turn)
            yield row
        if CAIRN in ports and (open_ := left(ports[CAIRN])):
            raise BenchFailed(f"Cairn still counts {open_} requests as open")


def _turn(generator: Generator, port: int, asked: bytes, case: Case, child: Child | None) -> Turn:
    with Probe(port, asking=case.load.connections > 1 and child is not None) as probe:
        spent = cpu_seconds(child.pid) if child else 0.0
        seen = generator.ask(port, "/v1/chat/completions", asked, case.load)
        spent = cpu_seconds(child.pid) - spent if child else 0.0
    return Turn(seen, spent, probe.p99, of_group(child.pid) if child else 0.0)


def left(port: int) -> int:
    """Requests Cairn still counts as open."""
    admin = httpx.get(f"http://127.0.0.1:{port}/admin/workers").json()
    return int(
        admin["inflight"] + sum(row["inflight"] + row["prefilling_tokens"] for row in admin["workers"])
    )


def bars(rows: Mapping[str, Row]) -> dict[str, Bar]:
    """The medians of the rounds' ratios; rounds are close together in time, the machine may drift."""
    found: dict[str, Bar] = {}

    def ratio(name: str, ours: list[float], theirs: list[float], bar: float, better: str) -> None:
        ratios = [a / max(b, 1e-6) for a, b in zip(ours, theirs, strict=True)]
        found[f"{name} (rounds {min(ratios):.2f} to {max(ratios):.2f})"] = Bar(
            statistics.median(ratios), bar, better
        )

    for name in ("1 KB, C=1", "1 KB, C=1, stream", "32 KB, C=1"):
        if (row := rows.get(name)) and VLLM in row.turns:
            ratio(f"added p50 ÷ vllm-router, {name}", row.added(CAIRN), row.added(VLLM), 1.5, "lower")
    if (row := rows.get("1 KB, C=32, stream")) and VLLM in row.turns:
        ratio("streams/s ÷ vllm-router, C=32", row.rate(CAIRN), row.rate(VLLM), 1.0, "higher")
    if (row := rows.get("1 KB, C=32")) and VLLM in row.turns:
        ratio("requests/s ÷ vllm-router, C=32", row.rate(CAIRN), row.rate(VLLM), 0.5, "higher")
    if (row := rows.get("1 KB, C=64, stream at 100/s")) and VLLM in row.turns:
        ours, theirs = row.cpu(CAIRN, "events"), row.cpu(VLLM, "events")
        ratio("CPU per chunk ÷ vllm-router", ours, theirs, 1.5, "lower")
    for name, bar in (("1 KB, keyed", 0.8), ("8k tokens, keyed", 1.5)):
        if row := rows.get(name):
            found[f"added p50 ms, {name}"] = Bar(statistics.median(row.added(CAIRN)), bar, "lower")
    errors = [
        turn.seen.errors + turn.seen.unanswered for row in rows.values() for turn in row.turns.get(CAIRN, [])
    ]
    found["Cairn's errors"] = Bar(sum(errors), 0, "lower")
    return found


_COLUMNS = (
    "side", "added ms p50", "p99", "answers/s", "gap ms p50", "p99", "CPU s/1k req", "/1k chunks", "lag ms",
    "MiB",
)  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """Medians of the rounds; direct has its own times instead of added ones."""
    shown = Table(*_COLUMNS, box=box.SIMPLE, title="medians of the rounds", title_justify="left")
    for row in rows:
        shown.add_section()
        shown.add_row(f"[bold]{row.case.name}")
        for side, turns in row.turns.items():
            direct = side == DIRECT
            times = [
                [getattr(turn.seen, name) for turn in turns] if direct else row.added(side, name)
                for name in ("ttfb_p50", "ttfb_p99")
            ]
            gaps = [[getattr(turn.seen, name) for turn in turns] for name in ("gap_p50", "gap_p99")]
            cpu = [row.cpu(side, "answered"), row.cpu(side, "events") if row.case.stream else [0.0]]
            rest = [[turn.lag for turn in turns], [turn.rss for turn in turns]]
            cells = [*times, row.rate(side), *gaps, *cpu, *rest]
            shown.add_row(side, *(f"{statistics.median(cell):.3f}" for cell in cells))
    return shown


def results(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for row in rows:
        for side, turns in row.turns.items():
            name = f"{row.case.name}, {side}"
            yield f"{name}: TTFB p50 ms", statistics.median(turn.seen.ttfb_p50 for turn in turns)
            yield f"{name}: answers/s", statistics.median(row.rate(side))
            if side != DIRECT:
                added = row.added(side)
                yield f"{name}: added p50 ms", statistics.median(added)
                yield f"{name}: added p50 min ms", min(added)
                yield f"{name}: added p50 max ms", max(added)
                yield f"{name}: CPU s / 1,000", statistics.median(row.cpu(side, "answered"))


def endure(lab: RouterLab, generator: Generator) -> dict[str, Bar]:
    """100,000 requests, a tenth of them aborted: what is left in memory and in the accounts."""
    case = Case("endure", KIB, Load(64, 10, aborts=0.1), stream=True, tokens=8)
    lab.fleet = Fleet(2, AT_ONCE, AT_ONCE, 32, 4000)
    sizes, asked = [], 0
    with lab.workers("") as urls, lab.router(ROUTERS[0], urls, "") as (child, port):
        words = [line.split()[0] for line in (lab.words / "vocabulary").read_text().splitlines()]
        for quarter in range(1, 5):
            while asked < quarter * 25_000:
                asked += generator.ask(port, "/v1/chat/completions", body(case, words), case.load).requests
            sizes.append(of_group(child.pid))
            lab.board.say(f"{asked} requests: {sizes[-1]:.1f} MiB")
        open_ = left(port)
    return {
        "memory after 100,000 ÷ after 50,000": Bar(sizes[3] / sizes[1], 1.02, "lower"),
        "tickets left": Bar(open_, 0, "lower"),
    }


def run(args: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[Row] = []
    with RouterLab(console, Fleet(2)) as lab:
        lab.install()
        generator = Generator(lab.programs, lab.folder)
        groups: dict[tuple[float, bool], list[Case]] = {}
        for case in cases(args.quick):
            if re.search(args.only, case.name):
                groups.setdefault((case.decode, case.keyed), []).append(case)
        for (_, keyed), held in groups.items():
            sides = [r for r in ROUTERS if r.side in args.sides and (r.side == CAIRN or not keyed)]
            rows += measure(lab, generator, held, sides, args.rounds or (3 if args.quick else 5))
        console.print(table(rows))
        found = bars({row.case.name: row for row in rows})
        if args.long:
            found |= endure(lab, generator)
    return finish("gateway", dict(results(rows)), found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--long", action="store_true", help="also 100,000 requests and the memory they leave")
    parser.add_argument("--only", default="", help="cases whose name matches this")
    parser.add_argument("--rounds", type=int, help="turns of each gateway in each case")
    parser.add_argument(
        "--sides",
        default=f"{CAIRN},{VLLM},{SMG}",
        help=f"gateways, comma-separated; also {', '.join(CARRIERS)}",
    )
    args = parser.parse_args()
    args.sides = args.sides.split(",")
    return sentence_on_failure(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
