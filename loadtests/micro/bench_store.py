"""The map at a million chunks.   python -m loadtests.micro.bench_store [--quick] [--evictor NAME]

The question: does the map stay as quick as it is empty, and what does it weigh?
The ceiling: a plain dict of as many keys, asked for the same prompts.

Prompts of 128 chunks, four of them sharing their first half, fill host and disk; then look-ups, loads and
saves that evict are timed on the full map.  CPU time of the thread, median over rounds.
"""

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cacheengine.config import CacheConfig
from cacheengine.evict import EVICTORS
from cacheengine.keys import ChunkKey
from cacheengine.plan import DISK, HOST, NO_PARENT, Want
from cacheengine.store import Store
from loadtests.report import Bar, finish

PROMPT, SHARED, FAMILY = 128, 64, 4


def prompt(n: int) -> list[Want]:
    """The n-th prompt; FAMILY neighbours share their first SHARED chunks."""
    wants: list[Want] = []
    parent = NO_PARENT
    for i in range(PROMPT):
        name = f"{n // FAMILY if i < SHARED else n}:{i}"
        key = ChunkKey(hashlib.sha256(name.encode()).digest()[:16])
        wants.append(Want(key, parent, wants[0].key if wants else key, 1, (i,)))
        parent = key
    return wants


def save(store: Store, wants: list[Want]) -> None:
    plan = store.begin_save("r", wants, spare={want.key for want in wants})
    if plan:
        store.settle(plan.id, len(plan.moves))
    while below := store.begin_demote(DISK, PROMPT):
        store.settle(below.id, len(below.moves))
    store.drain_changes()


def load(store: Store, wants: list[Want]) -> None:
    plan = store.begin_load("r", wants, ())
    store.use(wants[-1].key)
    store.settle(plan.id, len(plan.moves))


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def median_us(run: Callable[[int], object], rounds: int) -> float:
    times = []
    for i in range(rounds):
        start = time.thread_time()
        run(i)
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the chunks")
    parser.add_argument("--evictor", choices=sorted(EVICTORS), help="default: the one of a worker")
    args = parser.parse_args()
    chunks = 100_000 if args.quick else 1_000_000
    evictor = EVICTORS[args.evictor] if args.evictor else EVICTORS[CacheConfig().eviction]
    before, own = resident_bytes(), PROMPT - SHARED + SHARED // FAMILY  # new chunks a prompt brings
    store = Store({HOST: chunks // 4, DISK: chunks}, 1, evictor)
    count = chunks // own
    for n in track(range(count), "filling", console=Console(stderr=True), transient=True):
        save(store, prompt(n))
    weight = (resident_bytes() - before) / chunks
    held = {want.key: 0 for n in range(count) for want in prompt(n)}
    recent = [[want.key for want in prompt(count - 1 - n)] for n in range(100)]
    wants = [prompt(count - 1 - n) for n in range(100)]
    fresh = [prompt(FAMILY * count + n) for n in range(100)]
    found = {
        "dict look-up": median_us(lambda i: [key in held for key in recent[i]], 100),
        "look-up": median_us(lambda i: store.depth(recent[i]), 100),
        "load": median_us(lambda i: load(store, wants[i]), 100),
        "save that evicts": median_us(lambda i: save(store, fresh[i]), 100),
    }
    store.check()
    table = Table(title=f"{chunks:,} chunks, prompts of {PROMPT}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("a prompt's", "µs", "chunks/s"):
        table.add_column(name, justify="left" if name.startswith("a") else "right")
    for name, us in found.items():
        table.add_row(name, f"{us:,.0f}", f"{PROMPT / us * 1e6:,.0f}")
    Console().print(table)
    print(f"{weight:.0f} bytes a chunk")
    bars = {
        "look-up / dict": Bar(found["look-up"] / found["dict look-up"], 3.0, "lower"),
        "load µs": Bar(found["load"], 1_000, "lower"),
        "save that evicts µs": Bar(found["save that evicts"], 4_000, "lower"),
    }
    return finish("store", {"bytes a chunk": weight, **{f"{k} us": v for k, v in found.items()}}, bars)


if __name__ == "__main__":
    sys.exit(main())
