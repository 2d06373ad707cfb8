"""A worker and a reader of the chunk index, for tests on real servers."""

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cacheengine.errors import IndexDown
from cacheengine.index_reader import Fleet, IndexReader
from cacheengine.index_schema import Depths, Entry, WorkerInfo, chunk_name
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, Namespace, namespace_of
from tests.conftest import ValkeyServer

T = TypeVar("T")
NS = namespace_of({"model": "test"})
SCHEME = KeyScheme(NS, 16)
PROMPT = SCHEME.keys(range(16 * 12))
FORK = SCHEME.keys([*range(16 * 5), *range(900, 900 + 16 * 7)])  # shares 5 chunks
INFO = WorkerInfo("w1", "http://127.0.0.1:1", "m", "/m", NS.hex(), 16, ("aa", "bb"), tiers=("device", "host"))


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


class Loop:
    """Blocking verbs over the async reader."""

    def __init__(self, url: str, deadline_ms: float) -> None:
        self._runner = asyncio.Runner()
        self.reader, self._fleet = IndexReader(url, deadline_ms), Fleet(url)
        self.run(self.reader.open())

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(job)

    def holders(self, keys: list[ChunkKey], namespace: Namespace = NS) -> dict[tuple[str, int], Depths]:
        return self.run(self.reader.holders(namespace, keys))

    def down(self, keys: list[ChunkKey]) -> bool:
        try:
            self.holders(keys)
        except IndexDown:
            return True
        return False

    def fleet(self) -> dict[str, Any]:
        return {lease.info.worker_id: lease for lease in self.run(self._fleet.read())}

    def close(self) -> None:
        self.run(self.reader.close())
        self.run(self._fleet.close())
        self._runner.close()


class Worker:
    """A worker's map and its writer."""

    def __init__(self, url: str, info: WorkerInfo = INFO, lease: float = 2.0, **options: Any) -> None:
        self.held: dict[ChunkKey, Entry] = {}
        self.id = info.worker_id
        self.writer = IndexWriter(url, info, 600, lease, self.heartbeat, self.inventory, **options)

    def heartbeat(self) -> dict[str, float]:
        return {"running": 3}

    def inventory(self) -> list[Entry]:
        return list(self.held.values())

    def say(self, keys: list[ChunkKey], bits: int) -> None:
        entries = [Entry(keys[0], key, bits) for key in keys]
        for entry in entries:
            self.held[entry.key] = entry
        self.writer.publish(entries)

    @property
    def name(self) -> tuple[str, int]:
        return self.id, self.writer.epoch


def plant(
    valkey: ValkeyServer, keys: list[ChunkKey], held: dict[str, list[int]], namespace: Namespace
) -> None:
    """`held`: field → for each tier (device, host, disk, shared) how many leading chunks."""
    with valkey.client() as client, client.pipeline(transaction=False) as pipe:
        for (field, depths), i in itertools.product(held.items(), range(len(keys))):
            if bits := sum(1 << t for t in range(4) if i < depths[t]):
                pipe.hset(chunk_name(namespace, keys[0], keys[i]), field, bits)
        pipe.execute()
