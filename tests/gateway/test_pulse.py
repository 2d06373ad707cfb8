"""Counts of the last quarter of an hour: right, bounded, and moved by the clock alone."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.endpoints import ENDPOINTS
from gateway.exchange import Exchange, Prompt
from gateway.pulse import KINDS, STEP_SECONDS, STEPS, Pulse, Times, by_tier, merged_quantiles
from gateway.usage import Usage
from router.placement import Placement
from router.policy import TIERS
from router.worker import Load, Worker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(clock)


def exchange(
    status: int = 200,
    ttft: float | None = 0.1,
    expected: dict[str, int] | None = None,
    cached: int | None = None,
    failure: str = "",
    tokens: int = 1000,
) -> Exchange:
    hits = dict.fromkeys(TIERS, 0) | (expected or {})
    worker = Worker("w", "http://w", "m", load=Load(prefill_rate=1000))
    client: Any = SimpleNamespace(status=status)
    made = Exchange(client, ENDPOINTS["/v1/completions"], "/v1/completions", 0.0)
    made.prompt = Prompt("m", (), tokens, b"")
    made.placement = Placement(worker, sum(hits.values()), hits, "hit", "p", {"transfer": 100.0})
    made.ttft, made.failure = ttft, failure
    made.usage = Usage(cached=cached)
    return made


@given(st.lists(st.floats(0.0005, 3000), min_size=1, max_size=200))
def test_a_quantile_is_within_a_tenth_of_the_truth(seconds: list[float]) -> None:
    times = Times()
    for each in seconds:
        times.add(each)
    found = merged_quantiles([times, Times()])
    assert found is not None
    for share, guess in zip((0.5, 0.95), found, strict=True):
        ordered = sorted(seconds)
        true = ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
        assert true / 1.11 <= guess <= max(0.0011, true * 1.11)


def test_nothing_seen_is_no_quantile() -> None:
    assert merged_quantiles([Times()]) is None


def test_a_minute_of_traffic_is_a_rate(pulse: Pulse, clock: Clock) -> None:
    for second in range(120):
        clock.now = second
        pulse.ended(exchange())
        pulse.ended(exchange())
    clock.now = 119.9
    now = pulse.headline()
    assert now["requests_per_second"] == pytest.approx(2, rel=0.05)
    assert (now["requests"], now["hit_rate"], now["ttft_hit"]) == (240, 0.0, None)
    assert now["ttft_miss"][0] == pytest.approx(0.1, rel=0.11)


def test_hits_and_misses_are_told_apart_by_what_the_worker_said(pulse: Pulse) -> None:
    pulse.ended(exchange(expected={"host": 800}, cached=0, ttft=2.0))  # expected in vain
    pulse.ended(exchange(expected={"host": 800}, cached=800, ttft=0.2))
    pulse.ended(exchange(expected={"disk": 800}, cached=None, ttft=0.2))  # nothing said: as expected
    now = pulse.headline()
    assert now["ttft_miss"][0] == pytest.approx(2, rel=0.11)
    assert now["ttft_hit"][1] == pytest.approx(0.2, rel=0.11)
    assert now["hit_rate"] == pytest.approx(1600 / 3000)
    assert now["confirmed"] == pytest.approx(2 / 3)
    assert now["saved_seconds"] == pytest.approx(2 * (0.8 - 0.1))


def test_what_went_wrong_is_counted_by_kind_and_by_whose_fault_it_is(pulse: Pulse) -> None:
    pulse.ended(exchange(status=400, ttft=0.1))
    pulse.ended(exchange(status=404, ttft=None, failure="model_not_found"))
    pulse.ended(exchange(status=503, ttft=None, failure="no_worker"))
    pulse.ended(exchange(status=200, failure="upstream_error"))  # in the middle of a stream
    gone = exchange(status=0, ttft=None)
    gone.aborted = True
    pulse.ended(gone)
    now = pulse.headline()
    assert (now["errors_per_minute"], now["refused_per_minute"]) == (120, 120)  # in the first second
    kinds = {error["kind"]: error["count"] for error in pulse.errors()}
    assert kinds == {"worker answered 400": 1, "model_not_found": 1, "no_worker": 1, "upstream_error": 1}


def test_everything_is_forgotten_after_a_quarter_of_an_hour_and_nothing_grows(
    pulse: Pulse, clock: Clock
) -> None:
    rng = random.Random(1)
    for step in range(3 * STEPS):
        clock.now = step * STEP_SECONDS
        for _ in range(rng.randrange(4)):
            pulse.ended(exchange(failure=f"kind {step}" if step % 2 else ""))
        columns = pulse.series(0)["columns"]
        assert {len(values) for values in columns.values()} == {min(step, STEPS)}
    assert len(pulse.errors()) <= KINDS + 1
    clock.now += 10 * STEPS * STEP_SECONDS
    assert pulse.errors() == []
    assert set(pulse.series(0)["columns"]["requests"]) == {0}
    assert pulse.headline()["hit_rate_long"] is None


def test_who_asks_for_news_gets_only_news(pulse: Pulse, clock: Clock) -> None:
    for step in range(10):
        clock.now = step * STEP_SECONDS
        pulse.ended(exchange())
    whole = pulse.series(0)
    assert (whole["first"], whole["next"], whole["columns"]["requests"]) == (0, 9, [1] * 9)
    assert pulse.series(9)["columns"]["requests"] == []
    clock.now += 2 * STEP_SECONDS
    news = pulse.series(9)
    assert (news["first"], news["next"], news["columns"]["requests"]) == (9, 11, [1, 0])
    assert pulse.series(10**9)["columns"]["requests"] == []
    assert pulse.series(-5)["columns"]["requests"] == [*whole["columns"]["requests"], 1, 0]


@given(st.dictionaries(st.sampled_from(TIERS), st.integers(0, 5000)), st.integers(0, 9000))
def test_cached_tokens_are_dealt_to_tiers_without_loss(expected: dict[str, int], cached: int) -> None:
    dealt = by_tier(expected, cached)
    assert sum(dealt) == cached
    assert all(tokens <= expected.get(tier, 0) for tier, tokens in zip(TIERS[1:], dealt[1:], strict=True))
