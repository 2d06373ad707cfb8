"""What the cache costs when nothing is ever reused.   python -m loadtests.bench_overhead [--quick]

The question: how much throughput do gathering, writing behind and publishing take from a workload of unique
prompts?  The ceiling: plain vLLM on the same prompts, prefix caching off in both, the same cores.

Two workers, plain and with all tiers on; one is loaded at a time while the other is idle.  Pairs of runs on
the same prompts, who goes first alternates; the ratio is the median over the pairs.  Before a pair goes on,
what Cairn writes behind is waited for, so that it does not slow plain vLLM down.  That nothing was reused,
and that all was stored, is read from the worker's counters (exit code 2 otherwise).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from gateway.launch.config import DEFAULT_MODEL
from loadtests.engine import CHUNK, NO_DEVICE_CACHE, BenchFailed, Engine, Lab, rest, sentence_on_failure
from loadtests.report import Bar, finish
from loadtests.texts import slices

RATIO = 0.99
PROMPTS, TOKENS, MAX_TOKENS, CONCURRENCY = 8, 768, 16, 4  # of one run


class Pair(NamedTuple):
    """Prompt and answer tokens per second, and how long Cairn's tiers needed to catch up afterwards."""

    plain: float
    cairn: float
    behind_seconds: float

    @property
    def ratio(self) -> float:
        return self.cairn / self.plain


def throughput(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Tokens per second, prompts and answers, CONCURRENCY at a time."""
    rest()
    began = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda prompt: engine.ask(prompt, MAX_TOKENS), prompts))
    seconds = time.perf_counter() - began
    return sum(answer.prompt_tokens + answer.completion_tokens for answer in answers) / seconds


def measure(plain: Engine, cairn: Engine, runs: Sequence[Sequence[list[int]]]) -> list[Pair]:
    """The first run wakes both workers and is not counted.  Raises BenchFailed when anything was reused."""
    pairs, stored = [], 0
    for i, prompts in enumerate(runs):
        first = throughput(plain, prompts) if i % 2 else 0.0
        ours = throughput(cairn, prompts)
        stored += sum(len(prompt) // CHUNK for prompt in prompts)
        behind = cairn.settled(stored, "host", "disk", "redis")
        pairs.append(Pair(first or throughput(plain, prompts), ours, behind))
    for name, engine in (("plain vLLM", plain), ("Cairn", cairn)):
        if reused := {tier: tokens for tier, tokens in engine.sources().items() if tokens}:
            raise BenchFailed(f"{name} reused {reused} tokens: this is not a workload without reuse")
    return pairs[1:]


def report(pairs: Sequence[Pair]) -> Table:
    title = f"tokens/s, {PROMPTS} unique prompts of {TOKENS} tokens, {CONCURRENCY} at a time"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("pair", "plain vLLM", "Cairn", "ratio", "written behind s"):
        table.add_column(name, justify="right")
    for i, pair in enumerate(pairs, 1):
        table.add_row(
            str(i),
            f"{pair.plain:.1f}",
            f"{pair.cairn:.1f}",
            f"{pair.ratio:.3f}",
            f"{pair.behind_seconds:.1f}",
        )
    return table


def summary(pairs: Sequence[Pair]) -> dict[str, float]:
    """`noise` is what plain vLLM alone varies by: a ratio nearer to 1 than that says "no difference seen"."""
    plain = [pair.plain for pair in pairs]
    ratios = [pair.ratio for pair in pairs]
    return {
        "plain tokens/s": statistics.median(plain),
        "cairn tokens/s": statistics.median(pair.cairn for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio min": min(ratios),
        "ratio max": max(ratios),
        "noise": (max(plain) - min(plain)) / statistics.median(plain),
        "written behind s": statistics.median(pair.behind_seconds for pair in pairs),
    }


def bench(args: argparse.Namespace) -> int:
    count = args.pairs or (1 if args.quick else 8)
    with Lab(Console(stderr=True), model=args.model, dtype=args.dtype) as lab:
        prompts = slices(lab.token_ids(), (count + 1) * PROMPTS, TOKENS)
        runs = [prompts[at : at + PROMPTS] for at in range(0, len(prompts), PROMPTS)]
        with (
            lab.valkey() as redis_url,
            lab.engine("plain", None, *NO_DEVICE_CACHE) as plain,
            lab.engine("cairn", lab.disk("cairn"), *NO_DEVICE_CACHE, redis_url=redis_url) as cairn,
        ):
            pairs = measure(plain, cairn, runs)
    Console().print(report(pairs))
    found = summary(pairs)
    return finish("overhead", found, {"cairn / plain vLLM": Bar(found["ratio"], RATIO)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair: a first look")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `cairn up`")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="vLLM's --dtype")
    parser.add_argument("--pairs", type=int, default=0, help="default 8, quick 1")
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
