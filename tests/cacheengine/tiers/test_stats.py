"""Counters that several threads add to."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cacheengine.tiers.stats import TierStats


def test_nothing_is_lost_between_threads():
    stats = TierStats()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [stats.add(hits=1, read_seconds=0.5) for _ in range(2000)])
    assert (stats.hits, stats.read_seconds) == (8000, 4000.0)


def test_a_snapshot_names_every_counter():
    stats = TierStats()
    stats.add(bad_frames=2, write_seconds=1.5)
    assert stats.snapshot() == {
        "hits": 0, "misses": 0, "bad_frames": 2, "bytes_read": 0, "bytes_written": 0, "errors": 0,
        "read_seconds": 0.0, "write_seconds": 1.5,
    }  # fmt: skip
    assert stats.seconds == 1.5


def test_an_unknown_counter_is_a_bug():
    with pytest.raises(AttributeError):
        TierStats().add(hitz=1)
