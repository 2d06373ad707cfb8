"""Below the host tier everything may lie, stall or die: requests still succeed, with the right tokens.

Host arenas of five chunks, so that most of every repeat of a four-chunk prompt has to come from below.
Reference answers are computed by the same worker under a salt of their own, which shares nothing.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.engine.rig import Worker

CHUNK = 256
SPLIT = ("--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK))
TINY = {"host_bytes": 30 << 20}
salts = itertools.count()


@pytest.fixture(scope="module")
def pair(start, valkey_module, tmp_path_factory):
    """One worker over a disk, one over Redis."""
    folder = tmp_path_factory.mktemp("disk")
    disk = start("disk", {**TINY, "disk_path": str(folder), "disk_bytes": 1 << 30}, core=0, args=SPLIT)
    redis = start("redis", TINY, core=1, args=SPLIT, redis_url=valkey_module.unix_url)
    disk.ready().folder = folder
    return disk, redis.ready()


@pytest.fixture
def disk(pair) -> Worker:
    return pair[0]


@pytest.fixture
def redis(pair) -> Worker:
    return pair[1]


def prompt(seed: int, chunks: int = 4) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(chunks * CHUNK + 40)]


def truth(worker: Worker, tokens: list[int]) -> list[int]:
    return worker.complete(tokens, 24, cache_salt=f"truth {next(salts)}")


def store(worker: Worker, tier: str, tokens: list[int]) -> list[int]:
    """Have the prompt written to `tier`, then pushed out of the host arena; its true answer."""
    before = worker.written(tier)
    answer = worker.complete(tokens, 24)
    worker.settled(tier, int(before) + len(tokens) // CHUNK)
    assert truth(worker, tokens) == answer
    return answer


def flip_everywhere(worker: Worker, rng: random.Random) -> None:
    """One bit in every chunk's payload, at an offset of its own."""
    (path,) = worker.folder.glob("*.slots")
    with path.open("r+b") as f:
        blocks = path.stat().st_size // 4096
        used = [i for i in range(1, blocks) if _first_bytes(f, i) == b"CRNF"]
        for header in used:
            at = (header + 1) * 4096 + rng.randrange(5_000_000)
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
    assert used


def _first_bytes(f, block: int) -> bytes:
    f.seek(block * 4096)
    return f.read(4)


def test_flipped_bits_on_disk_are_counted_misses_and_never_wrong_tokens(disk):
    answer = store(disk, "disk", prompt(1))
    flip_everywhere(disk, random.Random(1))
    bad = disk.metric("cairn_engine_bad_frames_total", tier="disk")
    assert disk.complete(prompt(1), 24) == answer
    assert disk.metric("cairn_engine_bad_frames_total", tier="disk") > bad


def test_a_truncated_slot_file_is_a_miss(disk):
    answer = store(disk, "disk", prompt(2))
    (path,) = disk.folder.glob("*.slots")
    size = path.stat().st_size
    try:
        with path.open("r+b") as f:
            f.truncate(8192)
        assert disk.complete(prompt(2), 24) == answer
    finally:
        with path.open("r+b") as f:
            f.truncate(size)
    until, hits = time.monotonic() + 120, disk.hits("disk")
    for seed in itertools.count(300):  # and the tier goes on afterwards, when its breaker lets it
        answer = store(disk, "disk", prompt(seed))
        assert disk.complete(prompt(seed), 24) == answer
        if disk.hits("disk") > hits:
            break
        assert time.monotonic() < until, "the disk is not used again"


def _flip(client, name, rng):
    at = rng.randrange(client.strlen(name))
    byte = client.getrange(name, at, at)[0]
    client.setrange(name, at, bytes([byte ^ 1 << rng.randrange(8)]))


def _cut(client, name, rng):
    client.set(name, client.getrange(name, 0, rng.randrange(client.strlen(name))))


def _lose_value(client, name, rng):
    client.delete(name)


def _lose_metadata(client, name, rng):
    client.delete(name.removesuffix(b"_bytes"))


def _swap(client, name, rng):
    """Another chunk's perfectly good bytes under this key."""
    others = [other for other in client.keys("*_bytes") if other != name]
    client.set(name, client.get(rng.choice(others)))


@pytest.mark.parametrize(
    "harm", [_flip, _cut, _lose_value, _lose_metadata, _swap], ids=lambda f: f.__name__[1:]
)
def test_harmed_blobs_in_redis_are_misses_and_never_wrong_tokens(redis, valkey_module, harm):
    seed = 100 + sum(map(ord, harm.__name__))
    answer = store(redis, "redis", prompt(seed))
    rng = random.Random(seed)
    with valkey_module.client() as client:
        for name in client.keys("*_bytes"):
            harm(client, name, rng)
    assert redis.complete(prompt(seed), 24) == answer
    with valkey_module.client() as client:
        client.flushall()


class Traffic:
    """Three clients that repeat prompts from Redis without pause.  What they compute together depends on
    who shares a step with whom, so bf16 rounding may differ: here nothing may fail, hang or be cut short;
    that tokens are right is the business of the tests above and of the checksums."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.served, self.wrong = worker, 0, list[str]()
        self._stop = threading.Event()
        seeds = (21, 22, 23)
        for seed in seeds:
            store(worker, "redis", prompt(seed))
        self._threads = [threading.Thread(target=self._client, args=(seed,)) for seed in seeds]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                if len(self.worker.complete(prompt(seed), 24)) != 24:
                    self.wrong.append("a short answer")
            except (httpx.HTTPError, AssertionError, KeyError) as exc:  # whatever a client would see
                self.wrong.append(repr(exc))
            self.served += 1

    def during(self, fault: Callable[[], object], requests: int = 6) -> None:
        """Inject the fault under load; wait until `requests` more were served after it."""
        fault()
        goal = self.served + requests
        for _ in range(1200):
            if self.served >= goal:
                return
            self._stop.wait(0.1)
        raise AssertionError("the worker stopped serving")


def test_no_fault_of_redis_fails_a_request_under_load(redis, valkey_module):
    try:
        with Traffic(redis) as traffic, valkey_module.client() as client:
            traffic.during(lambda: client.execute_command("CLIENT", "PAUSE", 2000, "ALL"))
            traffic.during(lambda: valkey_module.pause(3.0))
            traffic.during(valkey_module.kill)
            traffic.during(valkey_module.start)
    finally:
        valkey_module.start()
    assert traffic.wrong == []


def test_after_all_that_redis_is_used_again_without_a_restart(redis, valkey_module):
    """The breaker half-opens by itself; what waited to be written goes first, whatever is asked meanwhile."""
    tokens = prompt(55)
    answer = truth(redis, tokens)
    for _ in range(120):
        hits = redis.hits("redis")
        assert redis.complete(tokens, 24) == answer
        if redis.hits("redis") > hits:
            break
        redis.complete(prompt(random.randrange(10**6)), 2)  # pushes it out of the host arena
        threading.Event().wait(0.5)
    else:
        raise AssertionError("nothing came from Redis again")
