"""Counters that several threads add to."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cacheengine.tiers.stats import TierStats


def test_nothing_is_lost_between_threads():
    stats = TierStats()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [stats.add(hits=1, bytes_read=2) for _ in range(2000)])
    assert (stats.hits, stats.bytes_read) == (8000, 16_000)


def test_an_unknown_counter_is_a_bug():
    with pytest.raises(AttributeError):
        TierStats().add(hitz=1)
