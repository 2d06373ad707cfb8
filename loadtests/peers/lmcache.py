"""Cairn's engine against LMCache 0.5.6, behind the same vLLM.   python -m loadtests.peers.lmcache [--quick]

The question: the same model, prompts and cores; which of the two caches makes vLLM answer sooner, costs it
less, and keeps it answering?  The ceilings: vLLM without any cache (cold, throughput), and 1: every line
divides LMCache by Cairn turn by turn, and where Cairn is not better the bench fails (exit code 1).

LMCache runs as its makers now develop it: its daemon (MP mode), engine_driven transfer through shared memory,
native file and RESP adapters.  Prefix caching in vLLM is off, so every hit is the cache's.  LMCache gets the
chunk size that Cairn runs with; --lmcache-chunk 256 is its own default.  Its hits are read from vLLM's
`cached_tokens`; where it has none, that is the measurement.  Cairn's are proved by its counters.

Sections, each under eight minutes on two cores: host, disk, redis, overhead, connectors, faults.
docs/peers.md has the last full run and what the comparison cannot say.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from gateway.launch.config import DEFAULT_MODEL
from loadtests import bench_overhead
from loadtests.engine import CHUNK, sentence_on_failure
from loadtests.peers import load, tiers, values
from loadtests.peers.daemon import VERSION, PeerLab
from loadtests.peers.lines import Line, bars, notes, table
from loadtests.report import finish
from loadtests.texts import slices

TOKENS = 3000


def _asked(lab: PeerLab, prompts: int, what: Callable[..., Iterator[Line]]) -> Iterator[Line]:
    first, *asked = slices(lab.token_ids(), prompts + 1, TOKENS)
    return what(lab, asked, first)


def _overhead(lab: PeerLab, quick: bool) -> Iterator[Line]:
    runs, size = 2 if quick else 6, bench_overhead.PROMPTS
    prompts = slices(lab.token_ids(), runs * size, bench_overhead.TOKENS)
    return load.overhead(lab, [prompts[at : at + size] for at in range(0, len(prompts), size)])


def _connectors(lab: PeerLab, quick: bool) -> Iterator[Line]:
    with lab.valkey() as url:
        yield from values.lines(lab.python, url, 2 if quick else 8)


SECTIONS: dict[str, Callable[[PeerLab, bool], Iterator[Line]]] = {
    "host": lambda lab, quick: _asked(lab, 2 if quick else 6, tiers.host),
    "disk": lambda lab, quick: _asked(lab, 2 if quick else 8, tiers.disk),
    "redis": lambda lab, quick: _asked(lab, 2 if quick else 6, tiers.redis),
    "overhead": _overhead,
    "connectors": _connectors,
    "faults": lambda lab, quick: _asked(lab, 2 * load.ASKED, load.faults),
}


def bench(args: argparse.Namespace) -> int:
    lines: list[Line] = []
    for name in args.only or SECTIONS:
        with PeerLab(
            Console(stderr=True), model=args.model, dtype=args.dtype, venv=args.venv, chunk=args.lmcache_chunk
        ) as lab:
            lab.install()
            lab.board.say(f"— {name}")
            for line in SECTIONS[name](lab, args.quick):
                lab.board.say(f"  {line}")
                lines.append(line)
    title = f"LMCache {VERSION} and Cairn behind the same vLLM, prompts of {TOKENS:,} tokens"
    Console().print(table(lines, title))
    print(notes(lines))
    results = {name: value for line in lines for name, value in line.results()}
    return finish("lmcache", {"lmcache chunk tokens": args.lmcache_chunk, **results}, bars(lines))


def sections(text: str) -> list[str]:
    """Raises argparse's error for a section that is none."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one or two turns of everything: a first look")
    parser.add_argument("--only", type=sections, help=f"comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--venv", type=Path, help="LMCache's own; default in the cache folder, made if missing"
    )
    parser.add_argument("--lmcache-chunk", type=int, default=CHUNK, help="tokens; its own default is 256")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `cairn up`")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="vLLM's --dtype")
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
