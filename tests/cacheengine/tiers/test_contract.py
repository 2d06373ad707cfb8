"""The law of a tier (cacheengine/tier.py), executed over every implementation."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cacheengine.errors import TierDown
from cacheengine.tier import Tier
from cacheengine.tiers.encoded import Encoded
from cacheengine.tiers.wrap import Breaker
from tests.cacheengine.tiers.flipped import Flipped
from tests.cacheengine.tiers.kit import PAYLOAD, blank, chunks, disk_tier, payload, redis_tier, ref

STORED = Flipped().encoded_bytes(PAYLOAD)


def encoded(tier: Tier) -> Tier:
    return Encoded(tier, Flipped(), PAYLOAD, threads=2)


MAKERS: dict[str, Callable[[pytest.FixtureRequest, Path], Tier]] = {
    "disk": lambda request, path: disk_tier(path / "w0"),
    "redis": lambda request, path: redis_tier(request.getfixturevalue("valkey").unix_url),
    "redis over tcp": lambda request, path: redis_tier(request.getfixturevalue("valkey").url),
    "redis-server": lambda request, path: redis_tier(flushed(request, "redis_server").url),
    "redis cluster": lambda request, path: redis_tier(flushed(request, "cluster").url),
    "redis by sentinel": lambda request, path: redis_tier(flushed(request, "sentinels").url),
    "redis over tls": lambda request, path: redis_tier(flushed(request, "tls_server").tls_url),
    "breaker of disk": lambda request, path: Breaker(disk_tier(path / "w0")),
    "encoded disk": lambda request, path: encoded(disk_tier(path / "w0", payload_bytes=STORED)),
    "encoded redis": lambda request, path: encoded(
        redis_tier(request.getfixturevalue("valkey").unix_url, payload_bytes=STORED)
    ),
}


SLOW = {"redis cluster", "redis by sentinel"}  # to start


def flushed(request: pytest.FixtureRequest, servers: str) -> Any:
    found = request.getfixturevalue(servers)
    found.flush()
    return found


@pytest.fixture(params=[pytest.param(m, marks=[pytest.mark.e2e] * (m in SLOW)) for m in MAKERS])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = MAKERS[request.param](request, tmp_path)
    yield made
    made.close()


def test_an_empty_tier_holds_nothing(tier: Tier):
    refs, _ = chunks(3)
    assert tier.prefix(refs) == 0
    assert tier.read(refs, blank(3)) == 0


def test_what_was_written_is_read_back(tier: Tier):
    refs, data = chunks(5)
    into = blank(5)
    assert tier.write(refs, data) == 5
    assert tier.prefix(refs) == 5
    assert tier.read(refs, into) == 5
    assert into == data


def test_a_gap_ends_the_prefix(tier: Tier):
    refs, data = chunks(4)
    tier.write(refs[:2], data[:2])
    tier.write(refs[3:], data[3:])
    into = blank(4)
    assert tier.prefix(refs) == 2
    assert tier.read(refs, into) == 2
    assert into[:2] == data[:2]


def test_a_tier_is_usable_after_a_gap(tier: Tier):
    refs, data = chunks(8)
    tier.write(refs[:1], data[:1])
    tier.write(refs[2:], data[2:])
    for _ in range(3):
        assert tier.read(refs, blank(8)) == 1
    into = blank(6)
    assert tier.read(refs[2:], into) == 6
    assert into == data[2:]


def test_rewriting_changes_nothing(tier: Tier):
    refs, data = chunks(3)
    into = blank(3)
    assert tier.write(refs, data) == 3
    assert tier.write(refs, data) == 3
    assert tier.read(refs, into) == 3
    assert into == data


def test_a_partly_known_batch_is_kept_whole(tier: Tier):
    refs, data = chunks(7)
    into = blank(7)
    tier.write(refs[2:4], data[2:4])
    assert tier.write(refs, data) == 7
    assert tier.read(refs, into) == 7
    assert into == data


def test_empty_batches_are_fine(tier: Tier):
    assert (tier.prefix([]), tier.read([], []), tier.write([], [])) == (0, 0, 0)


def test_a_buffer_longer_than_a_chunk_is_a_bug(tier: Tier):
    long = payload(0, PAYLOAD + 1)
    with pytest.raises(ValueError, match=f"buffer of {PAYLOAD + 1} bytes"):
        tier.write([ref(0)], [long])
    tier.write(*chunks(1))
    with pytest.raises(ValueError, match=f"buffer of {PAYLOAD + 1} bytes"):
        tier.read([ref(0)], [long])


def test_a_ref_without_a_buffer_is_a_bug(tier: Tier):
    refs, data = chunks(2)
    with pytest.raises(ValueError, match="shorter"):
        tier.write(refs, data[:1])


def test_the_callers_data_is_only_read(tier: Tier):
    refs, data = chunks(3)
    tier.write(refs, data)
    assert data == chunks(3)[1]


def test_threads_may_share_a_tier(tier: Tier):
    refs, data = chunks(8)

    def work(i: int) -> bool:
        into = blank(1)
        for _ in range(20):
            tier.write(refs[i : i + 1], data[i : i + 1])
            if tier.read(refs[i : i + 1], into) != 1 or into[0] != data[i]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_closing_twice_is_fine_and_a_closed_tier_is_down(tier: Tier):
    tier.close()
    tier.close()
    with pytest.raises(TierDown):
        tier.read([ref(0)], blank(1))
    with pytest.raises(TierDown):
        tier.write(*chunks(1))
