"""Moving chunks between the paged cache and slots.   python -m loadtests.micro.bench_gather [--quick]

The question: what does a step pay to save or load chunks of SmolLM2-135M on vLLM's CPU backend (30 layers,
two 96 KiB blocks a chunk and layer: 60 pieces, 5.9 MB)?
The ceilings: memcpy of the same bytes in one piece; and our own copy loop over one piece, which beats memcpy
on cold memory by not reading the destination.

cold: source and destination were last touched gigabytes ago.
fresh: the source was written a moment ago (by the prefill, or by a read from disk); the destination is cold.
warm: the same chunk again and again, which only a bench does.  Streaming stores lose there, and that is the
price of winning where it counts: no bar, but the figure is printed.
after: a first read of what was moved; streaming stores must not save time in the move to spend it there.
"""

import argparse
import ctypes
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from cacheengine import ops
from cacheengine.arena import Arena
from cacheengine.build import build_cpu
from loadtests.report import Bar, finish

LAYERS, BLOCK_BYTES, BLOCKS, PER_CHUNK, SLOTS = 30, 98_304, 364, 2, 128
CHUNK_BYTES = LAYERS * PER_CHUNK * BLOCK_BYTES


class Stage:
    """A paged cache and an arena of slots, touched, with cursors that revisit a place as late as possible."""

    def __init__(self) -> None:
        self.cache = Arena(1, LAYERS * BLOCKS * BLOCK_BYTES)
        self.arena = Arena(SLOTS, CHUNK_BYTES)
        for arena in (self.cache, self.arena):
            ctypes.memset(arena.address(0), 1, arena.nbytes)
        base = self.cache.address(0)
        layer_bytes = BLOCKS * BLOCK_BYTES
        bases = tuple(base + layer * layer_bytes for layer in range(LAYERS))
        self.paged = ops.Paged(bases, BLOCK_BYTES, BLOCK_BYTES, BLOCKS)
        pieces = self.cache.nbytes // CHUNK_BYTES
        self.whole = ops.Paged((base,), CHUNK_BYTES, CHUNK_BYTES, pieces)
        self.ids = self._cycle(BLOCKS)
        self.pieces = self._cycle(pieces)
        self.slots = self._cycle(SLOTS)

    def addresses(self, chunks: int) -> list[int]:
        return [self.arena.address(next(self.slots)) for _ in range(chunks)]

    def blocks(self, chunks: int) -> list[list[int]]:
        return [[next(self.ids) for _ in range(PER_CHUNK)] for _ in range(chunks)]

    @staticmethod
    def _cycle(n: int) -> Iterator[int]:
        order = list(range(n))
        random.Random(3).shuffle(order)
        return itertools.cycle(order)


def moves(stage: Stage, chunks: int, fresh: bool) -> dict[str, Callable[[], float]]:
    """Each draws new places, moves `chunks` chunks, and returns the seconds the move alone took."""

    def memcpy() -> float:
        source = stage.cache.address(0)
        pairs = [(to, source + next(stage.pieces) * CHUNK_BYTES) for to in stage.addresses(chunks)]
        write([where for _, where in pairs], CHUNK_BYTES)
        start = time.perf_counter()
        for to, where in pairs:
            ctypes.memmove(to, where, CHUNK_BYTES)
        return time.perf_counter() - start

    def one_piece() -> float:
        return gather(stage.whole, [[next(stage.pieces)] for _ in range(chunks)])

    def gather(paged: ops.Paged, blocks: ops.Blocks) -> float:
        slots = stage.addresses(chunks)
        pages = [base + b * paged.block_stride for base in paged.bases for ids in blocks for b in ids]
        write(pages, paged.block_bytes)
        start = time.perf_counter()
        ops.gather(paged, blocks, slots)
        return time.perf_counter() - start

    def scatter() -> float:
        blocks, slots = stage.blocks(chunks), stage.addresses(chunks)
        write(slots, CHUNK_BYTES)
        start = time.perf_counter()
        ops.scatter(stage.paged, blocks, slots)
        return time.perf_counter() - start

    def write(source: list[int], nbytes: int) -> None:
        if fresh:
            for address in source:
                ctypes.memset(address, 2, nbytes)

    return {
        "memcpy": memcpy,
        "one_piece": one_piece,
        "gather": lambda: gather(stage.paged, stage.blocks(chunks)),
        "scatter": scatter,
    }


def cold(stage: Stage, chunks: int, rounds: int, fresh: bool = False) -> dict[str, float]:
    """Median milliseconds a chunk.  The candidates take turns, so a noisy second hurts all of them."""
    candidates = moves(stage, chunks, fresh)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(run())
    return {name: statistics.median(times) * 1e3 / chunks for name, times in seconds.items()}


def warm(stage: Stage, rounds: int) -> dict[str, float]:
    """Median milliseconds of the same chunk over and over."""
    blocks, slots = stage.blocks(1), stage.addresses(1)
    source = stage.cache.address(0)
    candidates: dict[str, Callable[[], object]] = {
        "memcpy": lambda: ctypes.memmove(slots[0], source, CHUNK_BYTES),
        "gather": lambda: ops.gather(stage.paged, blocks, slots),
        "scatter": lambda: ops.scatter(stage.paged, blocks, slots),
    }
    return {name: median_ms(run, rounds) for name, run in candidates.items()}


def median_ms(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[rounds // 10 :]) * 1e3


def after(stage: Stage, rounds: int) -> dict[str, float]:
    """Milliseconds to compare a chunk with its copy (memcmp, so both are read) right after the move."""
    source = stage.cache.address(0)
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    movers: dict[str, Callable[[int, int], object]] = {
        "memcpy": lambda piece, slot: ctypes.memmove(slot, source + piece * CHUNK_BYTES, CHUNK_BYTES),
        "gather": lambda piece, slot: ops.gather(stage.whole, [[piece]], [slot]),
        "scatter": lambda piece, slot: ops.scatter(stage.whole, [[piece]], [slot]),
    }
    times: dict[str, list[float]] = {name: [] for name in movers}
    for _ in range(rounds):
        for name, move in movers.items():
            piece, (slot,) = next(stage.pieces), stage.addresses(1)
            move(piece, slot)
            start = time.perf_counter()
            if libc.memcmp(slot, source + piece * CHUNK_BYTES, CHUNK_BYTES):
                raise AssertionError("the move changed bytes")
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(kept) * 1e3 for name, kept in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = 20 if parser.parse_args().quick else 200
    build_cpu()
    stage = Stage()
    results: dict[str, float] = {}
    print(f"one chunk: {LAYERS} layers x {PER_CHUNK} blocks x {BLOCK_BYTES} B = {CHUNK_BYTES / 1e6:.1f} MB")
    tables = {
        "cold_1": cold(stage, 1, rounds),
        "cold_11": cold(stage, 11, max(rounds // 4, 10)),
        "fresh_1": cold(stage, 1, rounds, fresh=True),
        "warm_1": warm(stage, rounds * 5),
        "after": after(stage, rounds),
    }
    for case, table in tables.items():
        for name, ms in table.items():
            rate = CHUNK_BYTES / ms / 1e6
            print(
                f"{case:8} {name:10} {ms:7.3f} ms/chunk {rate:6.1f} GB/s {table['memcpy'] / ms:5.2f} x memcpy"
            )
            results[f"{case}_{name}_ms"] = ms
    bars = {}
    for case in ("cold_1", "cold_11", "fresh_1"):
        for verb in ("gather", "scatter"):
            bars[f"{case}_{verb}_vs_memcpy"] = Bar(tables[case]["memcpy"] / tables[case][verb], 1.2)
    for verb in ("gather", "scatter"):
        bars[f"cold_11_{verb}_vs_one_piece"] = Bar(
            tables["cold_11"]["one_piece"] / tables["cold_11"][verb], 0.9
        )
    return finish("gather", results, bars)


if __name__ == "__main__":
    sys.exit(main())
