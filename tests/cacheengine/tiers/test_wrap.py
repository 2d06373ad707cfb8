"""The breaker, with a clock that is an argument."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cacheengine.errors import TierDown
from cacheengine.tier import NullTier, Ref
from cacheengine.tiers.wrap import Breaker
from tests.cacheengine.tiers.kit import blank, chunks, ref


class Weather(NullTier):
    """A tier that is up or down as told, and counts how often it was asked."""

    name = "weather"

    def __init__(self) -> None:
        self.down = False
        self.asked = 0
        self.closed = False

    def prefix(self, refs: Sequence[Ref]) -> int:
        self.asked += 1
        if self.down:
            raise TierDown("rain")
        return len(refs)

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def inner() -> Weather:
    return Weather()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(inner: Weather, clock: Clock) -> Breaker:
    return Breaker(inner, failures=3, reset_seconds=5, clock=clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(TierDown):
            breaker.prefix([ref(0)])


def test_a_healthy_tier_is_asked_every_time(breaker: Breaker, inner: Weather):
    assert breaker.prefix([ref(0)]) == 1
    assert (breaker.name, breaker.open, inner.asked) == ("weather", False, 1)


def test_failures_that_are_not_in_a_row_do_not_open_it(breaker: Breaker, inner: Weather):
    for _ in range(5):
        inner.down = True
        fail(breaker, 2)
        inner.down = False
        breaker.prefix([ref(0)])
    assert not breaker.open


def test_an_open_breaker_answers_as_if_nothing_were_there(breaker: Breaker, inner: Weather):
    inner.down = True
    fail(breaker, 3)
    refs, data = chunks(2)
    assert breaker.open
    assert (breaker.prefix(refs), breaker.read(refs, blank(2)), breaker.write(refs, data)) == (0, 0, 0)
    assert inner.asked == 3


def test_it_tries_again_after_a_while_and_heals(breaker: Breaker, inner: Weather, clock: Clock):
    inner.down = True
    fail(breaker, 3)
    clock.now = 5
    inner.down = False
    assert breaker.prefix([ref(0)]) == 1
    assert not breaker.open


def test_one_failed_try_keeps_it_open_for_as_long_again(breaker: Breaker, inner: Weather, clock: Clock):
    inner.down = True
    fail(breaker, 3)
    clock.now = 5
    fail(breaker, 1)
    clock.now = 9.9
    assert breaker.prefix([ref(0)]) == 0
    assert inner.asked == 4
    clock.now = 10
    inner.down = False
    assert breaker.prefix([ref(0)]) == 1


def test_only_one_thread_tries(breaker: Breaker, inner: Weather, clock: Clock):
    inner.down = True
    fail(breaker, 3)
    clock.now = 5
    inside, leave = threading.Event(), threading.Event()

    class Slow(Weather):
        def prefix(self, refs: Sequence[Ref]) -> int:
            inside.set()
            leave.wait()
            return super().prefix(refs)

    breaker.inner = slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(breaker.prefix, [ref(0)])
        inside.wait()
        assert breaker.prefix([ref(0)]) == 0  # answered at once, while the other is still asking
        leave.set()
        assert trying.result() == 1
    assert slow.asked == 1
    assert not breaker.open


def test_a_bug_passes_through_and_blocks_no_later_try(breaker: Breaker, inner: Weather, clock: Clock):
    inner.down = True
    fail(breaker, 3)
    clock.now = 5

    class Buggy(Weather):
        def prefix(self, refs: Sequence[Ref]) -> int:
            raise ValueError("a bug")

    breaker.inner = Buggy()
    with pytest.raises(ValueError, match="a bug"):
        breaker.prefix([ref(0)])
    inner.down = False
    breaker.inner = inner
    assert breaker.prefix([ref(0)]) == 1


def test_closing_always_reaches_the_tier(breaker: Breaker, inner: Weather):
    inner.down = True
    fail(breaker, 3)
    breaker.close()
    assert inner.closed
