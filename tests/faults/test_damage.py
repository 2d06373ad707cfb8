"""Stored bytes that are not what was stored, at random places: counted misses, never wrong bytes in a page.

1,100 seeded cases: the slot file of a running engine, the slot file of one that is away, blobs in Redis.
Each case harms something, then asks; the rig compares every token's bytes with the truth.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from cacheengine.plan import DISK, REDIS
from tests.faults.rig import MiniEngine, on_disk, on_redis, prompt, stats_of

pytestmark = pytest.mark.e2e  # a minute of real faults


PROMPTS, SLOTS = 5, 24  # 20 chunks below a host arena of 6
Harm = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 20))):
        at = rng.randrange(path.stat().st_size)
        _patch(path, at, bytes([_bytes(path, at, 1)[0] ^ 1 << rng.randrange(8)]))


def zero(path: Path, rng: random.Random) -> None:
    _patch(path, rng.randrange(path.stat().st_size), bytes(rng.randrange(1, 20_000)))


def noise(path: Path, rng: random.Random) -> None:
    _patch(path, rng.randrange(path.stat().st_size), rng.randbytes(rng.randrange(1, 20_000)))


def cut(path: Path, rng: random.Random) -> None:
    """Shorter, or shorter and grown again with zeros: with a hole."""
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size))
    if rng.random() < 0.7:
        os.truncate(path, size)


def move(path: Path, rng: random.Random) -> None:
    """A stretch of whole pages, headers and all, at another page: good frames in places of others."""
    pages = max(1, path.stat().st_size // 4096)
    count, source, target = rng.randrange(1, 9), rng.randrange(pages), rng.randrange(pages)
    _patch(path, target * 4096, _bytes(path, source * 4096, count * 4096))


HARMS: dict[str, Harm] = {harm.__name__: harm for harm in (flip, zero, noise, cut, move)}


def _bytes(path: Path, at: int, count: int) -> bytes:
    with path.open("rb") as f:
        f.seek(at)
        return f.read(count)


def _patch(path: Path, at: int, data: bytes) -> None:
    """Overwrite; the file keeps its size."""
    with path.open("r+b") as f:
        f.seek(at)
        f.write(data[: max(0, path.stat().st_size - at)])


def harm_one(folder: Path, harm: Harm, rng: random.Random) -> None:
    """Any file of the tier: slots, and whatever it keeps beside them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    harm(rng.choice(files), rng)


def fill(engine: MiniEngine) -> None:
    for n in range(PROMPTS):
        engine.serve(prompt(n))
    engine.settle()


@pytest.mark.parametrize("name", HARMS)
@pytest.mark.parametrize("seed", range(2))
def test_a_slot_file_harmed_in_use_never_yields_wrong_bytes(tmp_path, keep, name, seed):
    engine, rng = keep(on_disk(tmp_path, SLOTS)), random.Random(f"{name} {seed}")
    fill(engine)
    for _ in range(60):
        harm_one(tmp_path, HARMS[name], rng)
        engine.serve(*(prompt(n) for n in rng.sample(range(PROMPTS), rng.choice((1, 1, 2)))))
    stats = stats_of(engine.tiers[DISK])
    assert stats.misses > 0, "nothing that was harmed was ever read: the test proves nothing"
    assert engine.hits > 0


@pytest.mark.parametrize("name", HARMS)
def test_a_slot_file_harmed_while_away_never_yields_wrong_bytes(tmp_path, keep, name):
    rng, hits, gaps = random.Random(name), 0, 0
    for _ in range(30):
        engine = on_disk(tmp_path, SLOTS)
        try:
            fill(engine)
            engine.settle()
        finally:
            engine.close()
        harm_one(tmp_path, HARMS[name], rng)
        engine = on_disk(tmp_path, SLOTS)
        try:
            for n in rng.sample(range(PROMPTS), 2):
                (request,) = engine.serve(prompt(n))
                gaps += request.loaded < 4 * 64
            engine.settle()
            hits += engine.hits
        finally:
            engine.close()
    assert hits > 0
    assert gaps > 0, "nothing that was harmed was ever read: the test proves nothing"


# -- Redis -----------------------------------------------------------------------------------------


def _strings(client: redis.Redis) -> list[bytes]:
    return [name for name in sorted(client.keys("*_bytes")) if client.type(name) == b"string"]


def _flip_value(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    at = rng.randrange(client.strlen(name))
    client.setrange(name, at, bytes([client.getrange(name, at, at)[0] ^ 1 << rng.randrange(8)]))


def _cut_value(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    value = client.get(name)
    client.set(name, value[: rng.randrange(1, len(value))])


def _grow_value(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    client.append(name, rng.randbytes(rng.randrange(1, 9_000)))


def _lose_value(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    client.delete(name)


def _lose_metadata(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    client.delete(name.removesuffix(b"_bytes"))


def _other_value(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    """Another chunk's perfectly good bytes under this name."""
    client.set(name, client.get(rng.choice(_strings(client))))


def _other_type(client: redis.Redis, name: bytes, rng: random.Random) -> None:
    client.delete(name)
    client.hset(name, mapping={"field": "value"})


BLOB_HARMS = [
    _flip_value, _cut_value, _grow_value, _lose_value, _lose_metadata, _other_value, _other_type,
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(5))
def test_blobs_harmed_in_redis_never_yield_wrong_bytes(valkey: Any, admin: redis.Redis, keep, seed):
    engine, rng = keep(on_redis(valkey.unix_url)), random.Random(seed)
    fill(engine)
    for _ in range(70):
        if names := _strings(admin):
            rng.choice(BLOB_HARMS)(admin, rng.choice(names), rng)
        engine.serve(*(prompt(n) for n in rng.sample(range(PROMPTS), rng.choice((1, 1, 2)))))
    assert stats_of(engine.tiers[REDIS]).bad_frames > 0
    assert engine.hits > 0
