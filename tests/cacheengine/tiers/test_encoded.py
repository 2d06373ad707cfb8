"""What the wrapper adds to the law of a tier: short buffers, bounded scratch, frames naming their codec."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cacheengine.codecs import CODECS, Codec, Page
from cacheengine.errors import TierDown
from cacheengine.tier import NullTier, Ref, Tier
from cacheengine.tiers.encoded import Encoded
from tests.cacheengine.tiers.flipped import Flipped
from tests.cacheengine.tiers.kit import PAYLOAD, blank, buffer, chunks, disk_tier, payload, redis_tier, ref

PAGE = Page(2, 1, 2, 64, "bfloat16")
WHOLE = 6 * PAGE.nbytes


class Memory(NullTier):
    """Keeps what it is given, as long as it is not told to be down."""

    name = "memory"

    def __init__(self, down_after: int = 1 << 30) -> None:
        self.held: dict[bytes, bytes] = {}
        self.left = down_after
        self.batches: list[int] = []

    def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
        self._count(refs)
        for i, (one, view) in enumerate(zip(refs, into, strict=True)):
            if len(self.held.get(one.key, b"")) != len(view):
                return i
            view[:] = self.held[one.key]
        return len(refs)

    def write(self, refs: Sequence[Ref], data: Sequence[memoryview]) -> int:
        self._count(refs)
        self.held.update((one.key, bytes(view)) for one, view in zip(refs, data, strict=True))
        return len(refs)

    def _count(self, refs: Sequence[Ref]) -> None:
        self.batches.append(len(refs))
        if not self.left:
            raise TierDown("memory is down")
        self.left -= 1


def numbers(seed: int, size: int = WHOLE) -> memoryview:
    """bfloat16 values between 1 and 2, of random last places."""
    rng = random.Random(seed)
    return buffer(
        size, b"".join((0x3F80 | rng.randrange(128)).to_bytes(2, "little") for _ in range(size // 2))
    )


@pytest.fixture
def codec() -> Codec:
    return CODECS["fp8"](PAGE)


def test_the_tier_inside_sees_only_encoded_bytes() -> None:
    inner = Memory()
    refs, data = chunks(2)
    assert Encoded(inner, Flipped(), PAYLOAD, 1).write(refs, data) == 2
    for one, view in zip(refs, data, strict=True):
        assert inner.held[one.key][16:] == bytes(255 - byte for byte in view)


def test_a_short_chunk_takes_less_and_comes_back(codec: Codec) -> None:
    inner = Memory()
    tier = Encoded(inner, codec, WHOLE, 1)
    short = numbers(1, 2 * PAGE.nbytes)
    tier.write([ref(0), ref(1)], [numbers(0), short])
    assert len(inner.held[ref(1).key]) == codec.encoded_bytes(len(short)) < len(inner.held[ref(0).key])
    into = [buffer(WHOLE), buffer(len(short))]
    assert tier.read([ref(0), ref(1)], into) == 2
    assert tier.read([ref(0)], [buffer(len(short))]) == 0  # another length is another chunk


def test_a_chunk_that_went_down_twice_comes_back_the_same(codec: Codec) -> None:
    tier = Encoded(Memory(), codec, WHOLE, 1)
    tier.write([ref(0)], [numbers(0)])
    once, twice = buffer(WHOLE), buffer(WHOLE)
    assert tier.read([ref(0)], [once]) == 1
    tier.write([ref(1)], [once])
    assert tier.read([ref(1)], [twice]) == 1
    assert once == twice != numbers(0)


def test_long_batches_are_cut_so_that_scratch_stays_small() -> None:
    inner = Memory()
    tier = Encoded(inner, Flipped(), PAYLOAD, 1)
    refs, data = chunks(11)
    into = blank(11)
    assert tier.write(refs, data) == 11
    assert tier.read(refs, into) == 11
    assert into == data
    assert inner.batches == [4, 4, 3] * 2


def test_going_down_after_some_chunks_is_a_shorter_prefix() -> None:
    inner = Memory()
    tier = Encoded(inner, Flipped(), PAYLOAD, 1)
    refs, data = chunks(8)
    tier.write(refs, data)
    inner.left = 1
    into = blank(8)
    assert tier.read(refs, into) == 4
    assert into[:4] == data[:4]
    with pytest.raises(TierDown):
        tier.read(refs, into)
    inner.left = 1
    assert tier.write(refs, data) == 4


def test_a_gap_leaves_later_buffers_alone() -> None:
    inner = Memory()
    tier = Encoded(inner, Flipped(), PAYLOAD, 1)
    refs, data = chunks(3)
    tier.write(refs, data)
    del inner.held[refs[1].key]
    into = blank(3)
    assert tier.read(refs, into) == 1
    assert into == [data[0], *blank(2)]


def test_callers_beyond_the_scratch_wait_for_their_turn() -> None:
    inside, most, lock = [0], [0], threading.Lock()

    class Slow(Memory):
        def read(self, refs: Sequence[Ref], into: Sequence[memoryview]) -> int:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            barrier.wait()
            with lock:
                inside[0] -= 1
            return 0

    barrier = threading.Barrier(2)
    tier = Encoded(Slow(), Flipped(), PAYLOAD, 2)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda i: tier.read([ref(i)], blank(1)), range(6))) == [0] * 6
    assert most[0] == 2


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_a_frame_of_another_codec_is_a_miss_that_stays(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
):
    def opened(codec: str) -> Tier:
        if kind == "disk":
            return disk_tier(tmp_path, codec=codec)
        return redis_tier(request.getfixturevalue("valkey").unix_url, codec=codec)

    for codec, found in (("flip", None), ("raw", 0), ("flip", 1)):
        tier = opened(codec)
        if found is None:
            assert tier.write([ref(0)], [payload(0)]) == 1
        else:
            assert tier.read([ref(0)], blank(1)) == found
            assert tier.stats.bad_frames == 0  # type: ignore[attr-defined]
        tier.close()
