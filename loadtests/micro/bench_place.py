"""Placing a prompt.   python -m loadtests.micro.bench_place [--quick]

The question: what does a decision cost the gateway's one thread, by workers and by chunks of the prompt?
No ceiling: who places by turns pays nothing.  The index answers at once (some workers hold half of what all
prompts share), no worker has anything to do, and every prompt is another one.  Of CPU, medians of rounds.
"""

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Sequence

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from cacheengine.index_schema import Depths, Lease
from cacheengine.keys import ChunkKey, Namespace
from loadtests.fleet_gateways import SCHEME, info
from loadtests.report import finish
from router.load import LoadBoard
from router.registry import Registry
from router.router import Router

WORKERS, CHUNKS = (2, 16, 64), (0, 10, 100)
PLACES = 200  # a round
BEAT = {"prefill_rate": "10000", "bw_host": "4e9", "bw_disk": "2e9", "bw_redis": "1e9", "beat_ms": "1"}


class Told:
    """Fleet and index in this process."""

    def __init__(self, workers: int, chunks: int) -> None:
        self._infos = [info(number) for number in range(workers)]
        self._held = {(one.worker_id, one.epoch): Depths(host=chunks // 4) for one in self._infos[::4]}

    async def read(self) -> list[Lease]:
        return [Lease(one, BEAT) for one in self._infos]

    async def holders(self, namespace: Namespace, keys: Sequence[ChunkKey]) -> dict[tuple[str, int], Depths]:
        return self._held


async def measure(workers: int, chunks: int, rounds: int) -> float:
    """Median CPU µs of one place()."""
    size = SCHEME.chunk_tokens
    common = list(range(chunks // 2 * size))
    prompts = [SCHEME.keys([*common, *([n] * (chunks * size - len(common)))]) for n in range(PLACES)]
    told, took = Told(workers, chunks), []
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: httpx.Response(200)), trust_env=False
    ) as http:
        registry = Registry(http, told)  # type: ignore[arg-type]
        router = Router(registry, LoadBoard(), told)  # type: ignore[arg-type]
        await registry.refresh()
        for _ in range(rounds):
            start = time.process_time()
            for n, keys in enumerate(prompts):
                (await router.place("m", keys, chunks * size + 50, affinity=b"%d" % n))[
                    0
                ]  # the rest is seldom looked at
            took.append(time.process_time() - start)
    return 1e6 * statistics.median(took) / PLACES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = 5 if parser.parse_args().quick else 50
    cases = list(itertools.product(WORKERS, CHUNKS))
    found = {case: asyncio.run(measure(*case, rounds)) for case in cases}
    table = Table(title="µs to place a prompt", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("workers", *(f"{chunks} chunks" for chunks in CHUNKS)):
        table.add_column(name, justify="right")
    for workers in WORKERS:
        table.add_row(str(workers), *(f"{found[workers, chunks]:.1f}" for chunks in CHUNKS))
    Console().print(table)
    names = {case: f"{case[0]} workers, {case[1]} chunks: us" for case in cases}
    return finish("place", {names[case]: us for case, us in found.items()}, {})


if __name__ == "__main__":
    sys.exit(main())
