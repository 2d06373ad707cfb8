"""The chunk index past this machine.   python -m loadtests.scale_index [--quick]

Up to 1,000 workers and 10M entries, all of them real in one Valkey: what a look-up, a change and an entry
cost as they grow, in the server's own time (INFO commandstats), which is what ends a single-threaded server,
and in the gateway's.  The fleet holds prompts of 128 chunks, each on four workers, and one system prompt that
all hold.  Then the same look-ups on a local Cluster of three nodes: a look-up is one script on one node, so
nodes add up.
"""

import argparse
import asyncio
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import redis
import uvloop

from cacheengine.index_reader import IndexReader
from cacheengine.index_schema import HOST, Entry, WorkerInfo
from cacheengine.index_wire import Wire
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from loadtests.report import Bar, finish
from tests.servers import Cluster, Server

SCHEME = KeyScheme(namespace_of({"bench": "scale_index"}), 1)
CHUNKS, HOLDERS, SYSTEM = 128, 4, 8
STEPS = ((16, 100_000), (100, 1_000_000), (1000, 1_000_000), (1000, 3_000_000), (1000, 10_000_000))
QUICK = ((16, 10_000), (1000, 100_000))
EPOCH = 1_700_000_000_000


def prompt(n: int) -> list[ChunkKey]:
    return SCHEME.keys([n, *range(CHUNKS - 1)])


def info_of(worker: int) -> WorkerInfo:
    worker_id = f"10.0.{worker // 250}.{worker % 250}:8000"
    return WorkerInfo(worker_id, "http://w", "m", "/m", SCHEME.namespace.hex(), 1, epoch=EPOCH)


class Load:
    """One index that grows."""

    def __init__(self, url: str) -> None:
        self.wire = Wire(url, 86_400, {})
        self.entries = self.prompts = 0
        self.rng = random.Random("scale")

    def grow(self, workers: int, entries: int) -> None:
        system = SCHEME.keys([10**9, *range(SYSTEM - 1)])
        for worker in range(workers):
            self.wire.write(info_of(worker), [Entry(system[0], key, HOST) for key in system])
        while self.entries < entries:
            keys = prompt(self.prompts)
            for worker in self.rng.sample(range(workers), HOLDERS):
                self.wire.write(info_of(worker), [Entry(keys[0], key, HOST) for key in keys])
            self.prompts += 1
            self.entries += HOLDERS * CHUNKS


def spent(client: redis.Redis) -> tuple[int, int]:
    """Scripts run, and the microseconds the server spent in them."""
    seen = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "usec": 0})
    return int(seen["calls"]), int(seen["usec"])


async def asked(
    reader: IndexReader, clients: Sequence[redis.Redis], prompts: Sequence[list[ChunkKey]]
) -> tuple[float, float]:
    """p50 of look-ups in ms at the gateway, and the mean in the servers, in us."""
    before = [spent(client) for client in clients]
    times = []
    for keys in prompts:
        start = time.perf_counter()
        await reader.holders(SCHEME.namespace, keys)
        times.append(1e3 * (time.perf_counter() - start))
    after = [spent(client) for client in clients]
    calls = sum(b[0] - a[0] for a, b in zip(before, after, strict=True))
    return statistics.median(times), sum(b[1] - a[1] for a, b in zip(before, after, strict=True)) / calls


def changed(load: Load, client: redis.Redis, workers: int, rounds: int) -> float:
    """Microseconds of the server for one entry, in batches of one prompt."""
    before, entries = spent(client)[1], 0
    for _ in range(rounds):
        keys = prompt(load.rng.randrange(load.prompts))
        load.wire.write(info_of(load.rng.randrange(workers)), [Entry(keys[0], key, 0) for key in keys])
        entries += len(keys)
    return (spent(client)[1] - before) / entries


async def one_server(steps: Sequence[tuple[int, int]], folder: Path, rounds: int) -> dict[str, float]:
    server, found = Server(folder), dict[str, float]()
    server.start()
    load, reader = Load(server.unix_url), IndexReader(server.unix_url, deadline_ms=1000)
    await reader.open()
    system = SCHEME.keys([10**9, *range(CHUNKS - 1)])  # the first of it all hold
    print(
        f"{'workers':>7} {'entries':>10} {'GiB':>6} {'B/entry':>7} {'warm us':>8} {'p50 ms':>7}"
        f" {'cold us':>8} {'system us':>9} {'change us':>9}"
    )
    with server.client() as client:
        for workers, entries in steps:
            load.grow(workers, entries)
            used = int(client.info("memory")["used_memory"])
            warm = [prompt(load.rng.randrange(load.prompts)) for _ in range(rounds)]
            p50, warm_us = await asked(reader, [client], warm)
            _, cold_us = await asked(reader, [client], [prompt(10**7 + n) for n in range(rounds)])
            _, system_us = await asked(reader, [client], [system] * (rounds // 4))
            change_us = changed(load, client, workers, rounds)
            print(
                f"{workers:>7} {load.entries:>10} {used / 2**30:>6.2f} {used / load.entries:>7.0f}"
                f" {warm_us:>8.1f} {p50:>7.3f} {cold_us:>8.1f} {system_us:>9.0f} {change_us:>9.2f}"
            )
            row = {
                "bytes an entry": used / load.entries, "warm us": warm_us, "warm p50 ms": p50,
                "cold us": cold_us, "system prompt us": system_us, "change us": change_us,
            }  # fmt: skip
            found |= {f"{workers} workers, {entries} entries: {what}": value for what, value in row.items()}
    await reader.close()
    load.wire.close()
    server.kill()
    return found


async def three_nodes(workers: int, entries: int, folder: Path, rounds: int) -> dict[str, float]:
    cluster = Cluster(folder)
    cluster.start()
    load, reader = Load(cluster.url), IndexReader(cluster.url, deadline_ms=1000)
    load.grow(workers, entries)
    await reader.open()
    await asyncio.sleep(1)
    clients = [node.client() for node in cluster.nodes]
    warm = [prompt(load.rng.randrange(load.prompts)) for _ in range(rounds)]
    p50, warm_us = await asked(reader, clients, warm)
    sizes = [int(client.dbsize()) for client in clients]
    share = max(sizes) * len(sizes) / sum(sizes)
    print(
        f"three nodes, {load.entries} entries: warm {warm_us:.1f} us, p50 {p50:.3f} ms, fullest {share:.2f}x"
    )
    for client in clients:
        client.close()
    await reader.close()
    load.wire.close()
    cluster.kill()
    return {"cluster warm us": warm_us, "cluster warm p50 ms": p50, "cluster fullest / mean": share}


async def scale(quick: bool, folder: Path) -> int:
    steps, rounds = (QUICK, 200) if quick else (STEPS, 2000)
    found = await one_server(steps, folder, rounds)
    found |= await three_nodes(*steps[1], folder, rounds)
    first, last = (
        f"{workers} workers, {entries} entries: warm" for workers, entries in (steps[0], steps[-1])
    )
    print(
        f"one server, last step: {1e6 / found[last + ' us']:,.0f} warm look-ups a second, doing nothing else"
    )
    bars = {  # medians: the mean in the server also counts the turns others had on its core
        "warm p50, largest / smallest": Bar(found[last + " p50 ms"] / found[first + " p50 ms"], 2, "lower"),
        "fullest node / mean": Bar(found["cluster fullest / mean"], 1.25, "lower"),
    }
    return finish("scale_index", found, bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100,000 entries instead of 10M")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    try:
        return uvloop.run(scale(args.quick, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
