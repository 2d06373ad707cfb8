"""Which eviction policy keeps the right chunks.   python -m loadtests.replay_eviction [--quick]

Replays a trace of real prompts (--trace FILE: jsonl as in loadtests/data/README.md) through one shelf, for
every policy and several capacities in blocks.  The rule is the store's:

* a request finds the longest prefix of its blocks that the shelf holds, and uses it, deepest block first;
* its other blocks are then added, root first;
* a full shelf gives up the end of a path behind the policy's first victim, never a block of the prompt being
  served; where there is no other, the rest of the prompt is not kept.

The figure is the share of all prompt blocks found.  A block is one slot, and 512 tokens but for a prompt's
last.

The ceiling, `optimum`, knows the future: of all blocks held and the one just used it gives up the one whose
next use is furthest (Belady 1966, with leave to keep a block not at all).  A parent is in every prompt that
its child is in, so its next use is never later, and the prefix rule costs this choice nothing.  It is thus
the most that any policy can find under the rule above; how near one without foresight can come is not known.
"""

import argparse
import heapq
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from cacheengine.evict import DEFAULT_EVICTOR, EVICTORS, Evictor
from cacheengine.keys import ChunkKey
from loadtests.report import Bar, finish

SAMPLE = Path(__file__).parent / "data" / "mooncake_sample.jsonl"
OPTIMUM = "optimum"
SHARES = (0.005, 0.025, 0.05, 0.1, 0.25, 1.0)  # of the trace's distinct blocks
CLOSE = 0.995  # the default may be this much worse than the best and still count as level with it

Prompt = Sequence[ChunkKey]


class Outcome(NamedTuple):
    hit_rate: float
    seconds: float


Outcomes = dict[tuple[str, int], Outcome]


class Shelf:
    """A tier's slots and the tree of what stands in them: the store's eviction, and nothing else of it."""

    def __init__(self, slots: int, evictor: Evictor) -> None:
        self._slots = slots
        self._evictor = evictor
        self._parents: dict[ChunkKey, ChunkKey | None] = {}
        self._children: dict[ChunkKey | None, dict[ChunkKey, None]] = {}

    def serve(self, prompt: Prompt) -> int:
        """Look `prompt` up, then keep what was missing.  Returns the blocks found."""
        found = sum(1 for _ in itertools.takewhile(self._parents.__contains__, prompt))
        for key in reversed(prompt[:found]):
            self._evictor.hit(key)
        spare = frozenset(prompt)
        for depth in range(found, len(prompt)):
            if len(self._parents) >= self._slots and not self._evict(spare):
                break
            parent = prompt[depth - 1] if depth else None
            self._parents[prompt[depth]] = parent
            self._children.setdefault(parent, {})[prompt[depth]] = None
            self._evictor.add(prompt[depth], depth)
        return found

    def held(self) -> frozenset[ChunkKey]:
        return frozenset(self._parents)

    def _evict(self, spare: frozenset[ChunkKey]) -> bool:
        victim = next((key for key in self._evictor.victims() if key not in spare), None)
        if victim is None:
            return False
        leaf = self._leaf(victim)
        parent = self._parents.pop(leaf)
        del self._children[parent][leaf]
        if not self._children[parent]:
            del self._children[parent]
        self._evictor.forget(leaf)
        return True

    def _leaf(self, key: ChunkKey) -> ChunkKey:
        """The end of a path that starts with `key`."""
        while below := self._children.get(key):
            key = next(iter(below))
        return key


def load(path: Path) -> list[Prompt]:
    """The prompts of a trace in order of arrival.  Raises ValueError, with the line, for what is no trace,
    and where a block stands behind two different ones: such ids do not name prefixes."""
    prompts: list[Prompt] = []
    parents: dict[ChunkKey, ChunkKey | None] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            ids = json.loads(line)["hash_ids"]
            prompt = [ChunkKey(int(block).to_bytes(16, "big")) for block in ids]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path.name}, line {number}: no request with hash_ids: {error!r}") from error
        for parent, key in itertools.pairwise([None, *prompt]):
            if key is not None and parents.setdefault(key, parent) != parent:
                raise ValueError(f"{path.name}, line {number}: block {int.from_bytes(key)} has two parents")
        prompts.append(prompt)
    return prompts


def replay(prompts: Sequence[Prompt], slots: int, evictor: Evictor) -> float:
    """The share of all blocks that was found."""
    shelf = Shelf(slots, evictor)
    return sum(shelf.serve(prompt) for prompt in prompts) / sum(map(len, prompts))


def optimum(prompts: Sequence[Prompt], slots: int) -> float:
    """The same for the clairvoyant ceiling described above."""
    uses = list(itertools.chain.from_iterable(prompts))
    following: list[int] = [len(uses)] * len(uses)
    last: dict[ChunkKey, int] = {}
    for i in range(len(uses) - 1, -1, -1):
        following[i] = last.get(uses[i], len(uses))
        last[uses[i]] = i
    held: dict[ChunkKey, int] = {}  # key → when it is used next
    furthest: list[tuple[int, ChunkKey]] = []
    found = 0
    for key, then in zip(uses, following, strict=True):
        found += key in held
        held[key] = then
        heapq.heappush(furthest, (-then, key))
        while len(held) > slots:
            negative, victim = heapq.heappop(furthest)
            if held.get(victim) == -negative:  # else it was used since
                del held[victim]
    return found / len(uses)


def run(prompts: Sequence[Prompt], capacities: Sequence[int]) -> Outcomes:
    outcomes: Outcomes = {}
    for slots in capacities:
        start = time.perf_counter()
        outcomes[OPTIMUM, slots] = Outcome(optimum(prompts, slots), time.perf_counter() - start)
        for name, make in EVICTORS.items():
            start = time.perf_counter()
            outcomes[name, slots] = Outcome(replay(prompts, slots, make()), time.perf_counter() - start)
    return outcomes


def table(outcomes: Outcomes, capacities: Sequence[int]) -> Table:
    shown = Table("policy", title="blocks found, percent, at so many slots", box=box.SIMPLE_HEAD)
    for slots in capacities:
        shown.add_column(f"{slots:,}", justify="right")
    shown.add_column("seconds", justify="right")
    for name in (OPTIMUM, *EVICTORS):
        row = [outcomes[name, slots] for slots in capacities]
        rates = (f"{outcome.hit_rate:.2%}".rstrip("%") for outcome in row)
        label = f"{name} (default)" if name == DEFAULT_EVICTOR else name
        shown.add_row(label, *rates, f"{sum(outcome.seconds for outcome in row):.1f}")
    return shown


def bars(outcomes: Outcomes, capacities: Sequence[int]) -> dict[str, Bar]:
    """Against each rival the default must be level or better at more than half of the capacities; the first
    bar is the strongest rival's.  The other two say what the choice may cost: they lie just below what the
    full trace and the sample gave, and notice a change."""

    def rates(name: str) -> list[float]:
        return [outcomes[name, slots].hit_rate for slots in capacities]

    mine = rates(DEFAULT_EVICTOR)
    kept_up = [
        sum(ours >= CLOSE * theirs for ours, theirs in zip(mine, rates(name), strict=True)) / len(mine)
        for name in EVICTORS
        if name != DEFAULT_EVICTOR
    ]
    worst = min(ours / theirs if theirs else 1.0 for ours, theirs in zip(mine, rates("lru"), strict=True))
    ceiling = sum(rates(OPTIMUM))
    return {
        "capacities where the default is level with a rival, fewest": Bar(min(kept_up), 0.51),
        "default / lru, at its worst": Bar(worst, 0.98),
        "default / optimum, over all capacities": Bar(sum(mine) / ceiling if ceiling else 1.0, 0.7),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, default=SAMPLE, help="jsonl; the sample when left out")
    parser.add_argument("--capacities", help="slots, with commas; shares of the trace's blocks when left out")
    parser.add_argument("--quick", action="store_true", help="three capacities")
    args = parser.parse_args(arguments)
    prompts = load(args.trace)
    distinct = len(set(itertools.chain.from_iterable(prompts)))
    if args.capacities:
        capacities = [int(slots) for slots in args.capacities.split(",")]
    else:
        capacities = [max(1, round(distinct * share)) for share in SHARES[:: 2 if args.quick else 1]]
    print(f"{args.trace.name}: {len(prompts)} prompts, {sum(map(len, prompts))} blocks, {distinct} distinct")
    outcomes = run(prompts, capacities)
    Console().print(table(outcomes, capacities))
    results = {f"{name} {slots}": outcome.hit_rate for (name, slots), outcome in outcomes.items()}
    return finish("replay_eviction", results, bars(outcomes, capacities))


if __name__ == "__main__":
    sys.exit(main())
