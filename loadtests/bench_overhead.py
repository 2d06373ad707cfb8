"""What the cache costs when nothing is ever reused.   python -m loadtests.bench_overhead [--quick]

The question: how much throughput do gathering, writing behind and publishing take from a workload of unique
prompts?  The ceiling: plain vLLM on the same prompts, prefix caching off in both, the same cores.

Three workers: plain twice, and one with all tiers on; one is loaded at a time while the others are idle.
Rounds of runs on the same prompts, who goes first rotates; the ratio is the median over the rounds, to the
mean of the two plain ones.  What these differ by from each other is what two processes of the same program
differ by on this machine.  Before a round goes on, what Cairn writes behind is waited for, so that it does
not slow plain vLLM down.  That nothing was reused, and that all was stored, is read from the workers'
counters (exit code 2 otherwise).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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


class Round(NamedTuple):
    """Prompt and answer tokens per second, and how long Cairn's tiers needed to catch up afterwards."""

    plain: float
    again: float  # the other plain worker
    cairn: float
    behind_seconds: float

    @property
    def ratio(self) -> float:
        return 2 * self.cairn / (self.plain + self.again)

    @property
    def control(self) -> float:
        return self.again / self.plain


def throughput(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Tokens per second, prompts and answers, CONCURRENCY at a time."""
    rest()
    began = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda prompt: engine.ask(prompt, MAX_TOKENS), prompts))
    seconds = time.perf_counter() - began
    return sum(answer.prompt_tokens + answer.completion_tokens for answer in answers) / seconds


def measure(engines: Mapping[str, Engine], runs: Sequence[Sequence[list[int]]]) -> list[Round]:
    """`engines` are plain, again and cairn.  The first run wakes them and is not counted.  Raises BenchFailed
    when anything was reused."""
    rounds, stored = [], 0
    for i, prompts in enumerate(runs):
        stored += sum(len(prompt) // CHUNK for prompt in prompts)
        found, behind = {}, 0.0
        for name in sorted(engines, key=lambda name: (list(engines).index(name) + i) % len(engines)):
            found[name] = throughput(engines[name], prompts)
            if name == "cairn":
                behind = engines[name].settled(stored, "host", "disk", "redis")
        rounds.append(Round(**found, behind_seconds=behind))
    for name, engine in engines.items():
        if reused := {tier: tokens for tier, tokens in engine.sources().items() if tokens}:
            raise BenchFailed(f"{name} reused {reused} tokens: this is not a workload without reuse")
    return rounds[1:]


def report(rounds: Sequence[Round]) -> Table:
    title = f"tokens/s, {PROMPTS} unique prompts of {TOKENS} tokens, {CONCURRENCY} at a time"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("round", "plain vLLM", "again", "Cairn", "ratio", "plain ÷ plain", "written behind s"):
        table.add_column(name, justify="right")
    for i, one in enumerate(rounds, 1):
        speeds = (f"{speed:.0f}" for speed in (one.plain, one.again, one.cairn))
        table.add_row(str(i), *speeds, f"{one.ratio:.3f}", f"{one.control:.3f}", f"{one.behind_seconds:.1f}")
    return table


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """`control` is what plain vLLM differs by from itself: a ratio nearer to 1 says "no difference seen"."""
    found = {}
    for name in ("ratio", "control"):
        values = [getattr(one, name) for one in rounds]
        found |= {name: statistics.median(values), f"{name} min": min(values), f"{name} max": max(values)}
    return found | {
        "plain tokens/s": statistics.median(one.plain for one in rounds),
        "cairn tokens/s": statistics.median(one.cairn for one in rounds),
        "written behind s": statistics.median(one.behind_seconds for one in rounds),
    }


def bench(args: argparse.Namespace) -> int:
    count = args.rounds or (1 if args.quick else 8)
    with Lab(Console(stderr=True), model=args.model, dtype=args.dtype) as lab:
        prompts = slices(lab.token_ids(), (count + 1) * PROMPTS, TOKENS)
        runs = [prompts[at : at + PROMPTS] for at in range(0, len(prompts), PROMPTS)]
        with (
            lab.valkey() as redis_url,
            lab.engine("plain", None, *NO_DEVICE_CACHE) as plain,
            lab.engine("again", None, *NO_DEVICE_CACHE) as again,
            lab.engine("cairn", lab.disk("cairn"), *NO_DEVICE_CACHE, redis_url=redis_url) as cairn,
        ):
            rounds = measure({"plain": plain, "again": again, "cairn": cairn}, runs)
    Console().print(report(rounds))
    found = summary(rounds)
    return finish("overhead", found, {"cairn / plain vLLM": Bar(found["ratio"], RATIO)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: a first look")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `cairn up`")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="vLLM's --dtype")
    parser.add_argument("--rounds", type=int, default=0, help="default 8, quick 1")
    args = parser.parse_args(argv)
    return sentence_on_failure(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
