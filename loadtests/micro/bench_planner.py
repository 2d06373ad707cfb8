"""What a request costs vLLM's scheduler thread.   python -m loadtests.micro.bench_planner [--quick]

The question: how long does the map keep the scheduler from scheduling, for a prompt of 32k tokens over its
whole life, and for each further step?  Everything of planner and store runs here for real; only the ranks'
reports are made up.
The ceiling: hashing the prompt (bench_keys), which has to happen somewhere.

cold: nothing is here; chunks are saved as prefill proceeds, 2,048 tokens a step.
warm: everything is in the host tier and is loaded.
decode: one more token of one running request; and of 256.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from cacheengine.connectors.demoter import Demoter
from cacheengine.connectors.planner import Geometry, Planner, Scheduled
from cacheengine.keys import KeyScheme, Namespace
from cacheengine.metrics import Tally
from cacheengine.plan import DISK, HOST, Plan
from cacheengine.store import Store
from loadtests.report import Bar, finish

TOKENS, CHUNK, BLOCK, STEP = 32_768, 256, 16, 2_048
T = TypeVar("T")
SCHEME = KeyScheme(Namespace(bytes(16)), CHUNK)


class Watch:
    """Adds up the CPU seconds of the calls made through it; what others take meanwhile is not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[..., T], *args: object) -> T:
        start = time.thread_time()
        answer = call(*args)
        self.seconds += time.thread_time() - start
        return answer


def new_planner(chunks: int) -> Planner:
    store = Store({HOST: chunks, DISK: 4 * chunks}, CHUNK // BLOCK)
    demoter = Demoter(store, "idle", 256)
    geometry = Geometry(CHUNK, 23_040 * CHUNK, BLOCK, 1)
    return Planner(SCHEME, geometry, store, demoter, lambda keys: None, 1.0, Tally())


def settle(planner: Planner, plans: Sequence[Plan], watch: Watch) -> None:
    watch(planner.report, {plan.id: (1, len(plan.moves)) for plan in plans})


def cold(planner: Planner, name: str, tokens: list[int], blocks: list[int]) -> float:
    watch = Watch()
    watch(planner.begin, name, tokens, ())
    if watch(planner.matched, name, tokens, 0):
        raise AssertionError("a prompt that should be cold")
    for start in range(0, TOKENS, STEP):
        plans = watch(planner.step, [Scheduled(name, tokens, start, STEP, blocks)])
        settle(planner, plans, watch)
    watch(planner.end, name)
    return watch.seconds


def warm(planner: Planner, name: str, tokens: list[int], blocks: list[int]) -> float:
    watch = Watch()
    watch(planner.begin, name, tokens, ())
    hit = watch(planner.matched, name, tokens, 0)
    if hit != TOKENS - BLOCK:
        raise AssertionError(f"a hit of {hit} tokens")
    watch(planner.allocated, name, blocks, hit)
    settle(planner, watch(planner.step, ()), watch)
    settle(planner, watch(planner.step, [Scheduled(name, tokens, hit, BLOCK, blocks)]), watch)
    watch(planner.end, name)
    return watch.seconds


def decode(requests: int, rounds: int) -> float:
    """Seconds of one step."""
    planner, times = new_planner(8 * requests), []
    prompts = [random.Random(i).choices(range(49_152), k=1000) for i in range(requests)]
    blocks = list(range(200))
    for i, tokens in enumerate(prompts):
        planner.begin(str(i), tokens, ())
        settle(planner, planner.step([Scheduled(str(i), tokens, 0, 1000, blocks)]), Watch())
    for n in range(rounds):
        for tokens in prompts:
            tokens.append(n)
        step = [Scheduled(str(i), tokens, 1000 + n, 1, blocks) for i, tokens in enumerate(prompts)]
        watch = Watch()
        plans = watch(planner.step, step)
        settle(planner, plans, watch)
        times.append(watch.seconds)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = 10 if parser.parse_args().quick else 100
    planner, blocks = new_planner(4 * TOKENS // CHUNK), list(range(TOKENS // BLOCK))
    colds, warms = [], []
    for i in range(rounds):
        tokens = random.Random(i).choices(range(49_152), k=TOKENS)
        colds.append(cold(planner, f"cold{i}", tokens, blocks))
        warms.append(warm(planner, f"warm{i}", tokens, blocks))
        planner.store.check()
    found = {
        f"cold, {TOKENS // STEP} steps": statistics.median(colds) * 1e3,
        "warm": statistics.median(warms) * 1e3,
        "decode step, 1 request": decode(1, 10 * rounds) * 1e3,
        "decode step, 256 requests": decode(256, rounds) * 1e3,
    }
    table = Table(title=f"a prompt of {TOKENS:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("scheduler thread")
    table.add_column("ms", justify="right")
    for name, ms in found.items():
        table.add_row(name, f"{ms:.4f}")
    Console().print(table)
    bars = {
        "cold ms": Bar(found[f"cold, {TOKENS // STEP} steps"], 1.0 + 0.05 * (TOKENS // STEP), "lower"),
        "warm ms": Bar(found["warm"], 1.0, "lower"),
        "decode step ms": Bar(found["decode step, 1 request"], 0.05, "lower"),
    }
    return finish("planner", {f"{name} ms": ms for name, ms in found.items()}, bars)


if __name__ == "__main__":
    sys.exit(main())
