"""The disk tier against its device.   python -m loadtests.micro.bench_disk [--quick] [--slots N]

The questions: what does the tier cost beside O_DIRECT itself, for chunks of SmolLM2-135M (5.9 MB)?  Would
io_uring read faster than threads?  How long does a restart take to know again what N slots hold?
The ceiling: preadv and pwritev of the same payload bytes of the same file, into the same memory, without
headers or checksums; the candidates take turns.  The tier's figures include header, XXH3 and the copy of it.

1, 2: callers at once, each with batches of four chunks, as the mover's loaders ask for them.  Raw callers
have one transfer under way each; the tier has three a device, whoever asks.
io_uring: four reads in one system call, from one thread, nothing verified: the most a ring could give.
restart: slots with a small payload, nothing in the page cache; by the header copies, and without them.
"""

import argparse
import ctypes
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cacheengine import frame
from cacheengine.arena import Arena
from cacheengine.keys import ChunkKey, Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.disk import DiskTier, scan
from cacheengine.tiers.heads import PAGE, RECORD, heads_file
from cacheengine.tiers.slotfile import slot_file
from loadtests.micro.uring import Job, Ring
from loadtests.report import Bar, finish

PAYLOAD, TOKENS, BATCH, BATCHES = 5_898_240, 256, 4, 4
NAMESPACE = Namespace(digest(b"bench"))
SMALL = PAGE  # payload of a slot in the restart part
MOST_SECONDS = 2.0  # a restart with 100,000 slots


class Stage:
    """A tier on its file, the same file for raw access, and an arena that was touched."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.stride = PAGE + PAYLOAD
        capacity = 2 * PAGE + slots * (self.stride + RECORD)
        self.tier = DiskTier([folder], capacity, PAYLOAD, NAMESPACE, TOKENS, 0, 1)
        self.fd = os.open(slot_file(folder, 0), os.O_RDWR | (os.O_DIRECT if self.tier.direct else 0))
        self.arena = Arena(BATCH * BATCHES, PAYLOAD)
        for slot in range(self.arena.slots):
            ctypes.memset(self.arena.address(slot), slot + 1, PAYLOAD)
        self.keys = [ChunkKey(digest(slot.to_bytes(4, "little"))) for slot in range(slots)]
        self.rng = random.Random(1)

    def draw(self) -> list[list[tuple[int, int]]]:
        """Batches of (slot of the file, slot of the arena); no slot twice."""
        drawn = self.rng.sample(range(self.tier.slots), BATCH * BATCHES)
        pairs = list(zip(drawn, range(BATCH * BATCHES), strict=True))
        return [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]

    def fill(self) -> None:
        for slot in range(self.tier.slots):
            self.write([(slot, slot % self.arena.slots)])

    def read(self, batch: Sequence[tuple[int, int]]) -> None:
        refs, views = self._both(batch)
        if self.tier.read(refs, views) != len(batch):
            raise AssertionError("a chunk was not read back")

    def write(self, batch: Sequence[tuple[int, int]]) -> None:
        refs, views = self._both(batch)
        if self.tier.write(refs, views) != len(batch):
            raise AssertionError("a chunk was not kept")

    def raw_read(self, batch: Sequence[tuple[int, int]]) -> None:
        for slot, at in batch:
            if os.preadv(self.fd, [self.arena.view(at)], self._offset(slot)) != PAYLOAD:
                raise AssertionError("short read")

    def raw_write(self, batch: Sequence[tuple[int, int]]) -> None:
        for slot, at in batch:
            if os.pwritev(self.fd, [self.arena.view(at)], self._offset(slot)) != PAYLOAD:
                raise AssertionError("short write")

    def ring_read(self, ring: Ring) -> Callable[[Sequence[tuple[int, int]]], None]:
        def read(batch: Sequence[tuple[int, int]]) -> None:
            ring.read(
                [Job(self.fd, self.arena.address(at), PAYLOAD, self._offset(slot)) for slot, at in batch]
            )

        return read

    def _both(self, batch: Sequence[tuple[int, int]]) -> tuple[list[Ref], list[memoryview]]:
        return [Ref(self.keys[slot], slot) for slot, _ in batch], [self.arena.view(at) for _, at in batch]

    def _offset(self, slot: int) -> int:
        return PAGE + slot * self.stride + PAGE


Verb = Callable[[Sequence[tuple[int, int]]], None]


def rates(stage: Stage, verbs: dict[str, tuple[Verb, int]], rounds: int) -> dict[str, list[float]]:
    """GB/s of each verb with its number of threads, round by round.  The verbs take turns."""
    pools = {count: ThreadPoolExecutor(count) for _, count in verbs.values()}
    found: dict[str, list[float]] = {name: [] for name in verbs}
    for _ in range(rounds):
        for name, (verb, count) in verbs.items():
            batches = stage.draw()
            start = time.perf_counter()
            list(pools[count].map(verb, batches))
            found[name].append(BATCH * BATCHES * PAYLOAD / (time.perf_counter() - start) / 1e9)
    for pool in pools.values():
        pool.shutdown()
    return found


def reading(stage: Stage, rounds: int) -> dict[str, list[float]]:
    verbs: dict[str, tuple[Verb, int]] = {
        "read raw 1": (stage.raw_read, 1),
        "read tier 1": (stage.read, 1),
        "read raw 2": (stage.raw_read, 2),
        "read tier 2": (stage.read, 2),
    }
    try:
        ring = Ring(BATCH)
    except OSError as exc:
        print(f"io_uring is not to be had here: {exc.strerror}")
        return rates(stage, verbs, rounds)
    found = rates(stage, verbs | {"read io_uring": (stage.ring_read(ring), 1)}, rounds)
    ring.close()
    return found


def writing(stage: Stage, rounds: int) -> dict[str, list[float]]:
    verbs: dict[str, tuple[Verb, int]] = {
        "write raw 1": (stage.raw_write, 1),
        "write raw 2": (stage.raw_write, 2),
        "write tier 1": (stage.write, 1),
    }
    return rates(stage, verbs, rounds)


def restart(folder: Path, slots: int, rounds: int) -> dict[str, list[float]]:
    """Seconds until what the slots hold is known, nothing of the files being cached."""
    place = (2 * PAGE + slots * (PAGE + SMALL + RECORD), SMALL, NAMESPACE)
    DiskTier([folder], *place, TOKENS, 0, 1).close()
    payload = bytes(SMALL)
    with slot_file(folder, 0).open("r+b") as file:
        file.seek(PAGE)
        for slot in range(slots):
            key = ChunkKey(digest(slot.to_bytes(4, "little")))
            file.write(frame.pack(NAMESPACE, key, key, key, payload, TOKENS, 0, 1).ljust(PAGE, b"\0"))
            file.write(payload)
    found: dict[str, list[float]] = {"scan slots": [], "open without copies": [], "scan copies": []}
    for _ in range(rounds):
        heads_file(folder, 0).unlink()
        found["scan slots"].append(_scan(folder, slots, place))
        _forget(folder)
        start = time.perf_counter()
        tier = DiskTier([folder], *place, TOKENS, 0, 1)
        found["open without copies"].append(time.perf_counter() - start)
        tier.close()
        found["scan copies"].append(_scan(folder, slots, place))
    return found


def _scan(folder: Path, slots: int, place: tuple[int, int, Namespace]) -> float:
    _forget(folder)
    start = time.perf_counter()
    known = len(scan([folder], *place, 0, 1))
    if known != slots:
        raise AssertionError(f"{known} of {slots} chunks found")
    return time.perf_counter() - start


def _forget(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ratio(found: dict[str, list[float]], ours: str, raw: str) -> float:
    """Median of the rounds' own ratios: a noisy second hurts both sides of its round."""
    return statistics.median(a / b for a, b in zip(found[ours], found[raw], strict=True))


def rows(found: dict[str, list[float]], unit: str) -> Iterator[tuple[str, str, str, str]]:
    for name, values in found.items():
        yield name, f"{statistics.median(values):.3g} {unit}", f"{min(values):.3g}", f"{max(values):.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a fifth of the slots")
    parser.add_argument("--slots", type=int, default=100_000, help="slots of the restart part")
    parser.add_argument("--folder", type=Path, help="where; default: a temporary folder")
    args = parser.parse_args()
    rounds, slots = (6, args.slots // 5) if args.quick else (30, args.slots)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="cairn-bench-") as name:
        big, small = Path(name) / "big", Path(name) / "small"
        stage = Stage(big, 64 if args.quick else 200)
        stage.fill()
        written = writing(stage, rounds)
        stage.fill()
        found = written | reading(stage, rounds)
        os.close(stage.fd)
        stage.tier.close()
        slot_file(big, 0).unlink()
        started = restart(small, slots, 3)
    table = Table(
        "", "median", "least", "most", title=f"{PAYLOAD / 1e6:.1f} MB chunks; {slots} slots to restart"
    )
    for row in (*rows(found, "GB/s"), *rows(started, "s")):
        table.add_row(*row)
    Console().print(table)
    results = {f"{name} GB/s": statistics.median(values) for name, values in found.items()}
    results |= {f"{name} s": statistics.median(values) for name, values in started.items()}
    bars = {
        "read / raw, one caller": Bar(ratio(found, "read tier 1", "read raw 1"), 0.9),
        "read / raw, two callers": Bar(ratio(found, "read tier 2", "read raw 2"), 0.9),
        "write / raw": Bar(ratio(found, "write tier 1", "write raw 1"), 0.9),
        "restart s": Bar(max(started["scan copies"]), MOST_SECONDS, "lower"),
    }
    return finish("disk", {**results, "slots": slots, "direct": stage.tier.direct}, bars)


if __name__ == "__main__":
    sys.exit(main())
